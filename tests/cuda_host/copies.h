// cp.async of one thread: a copy happens no earlier than the wait that covers it.
#pragma once

#include <cstddef>
#include <cstring>
#include <utility>
#include <vector>

namespace cuda_host {

class Copies {
 public:
  static constexpr size_t kMostBytes = 16;

  // The destination is garbage from now on: who reads it before the wait, or still needs what was
  // there, will notice. The source is read here too, so that a bad address shows where it is given.
  void issue(void* to, const void* from, size_t bytes = kMostBytes) {
    unsigned char seen[kMostBytes];
    if (from) std::memcpy(seen, from, bytes);
    asm volatile("" : : "r"(seen) : "memory");
    std::memset(to, 0xff, bytes);
    open_.push_back({to, from, bytes});
  }

  void commit() { groups_.push_back(std::exchange(open_, {})); }

  // Completes all groups but the `pending` latest.
  void wait(size_t pending) {
    while (groups_.size() > pending) {
      for (const Copy& copy : groups_.front()) copy.run();
      groups_.erase(groups_.begin());
    }
  }

  bool empty() const {
    for (const auto& group : groups_) {
      if (!group.empty()) return false;
    }
    return open_.empty();
  }
  void clear() { groups_.clear(), open_.clear(); }

 private:
  struct Copy {
    void* to;
    const void* from;  // null: zeros
    size_t bytes;
    void run() const {
      if (from) {
        std::memcpy(to, from, bytes);
      } else {
        std::memset(to, 0, bytes);
      }
    }
  };
  std::vector<Copy> open_;
  std::vector<std::vector<Copy>> groups_;
};

}  // namespace cuda_host
