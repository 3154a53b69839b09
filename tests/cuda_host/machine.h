// The machine of cuda_host.h: a block's threads as fibres, their schedule, barriers, collectives.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "copies.h"
#include "fibres.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace cuda_host {

enum class Order { kForward, kReverse, kRandom };

// A line of source code; `file` is what __FILE__ said.
struct Place {
  const char* file;
  int line;
  bool operator==(const Place& o) const { return line == o.line && !std::strcmp(file, o.file); }
};

struct Options {
  Order order = Order::kForward;
  unsigned seed = 0;
  // The barrier to ignore: line 0 for none, the file by its last part.
  std::string dropped_file;
  int dropped_line = 0;
};

inline constexpr unsigned kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;
inline constexpr size_t kSlotBytes = 64;  // widest value that a collective exchanges
inline constexpr int kMostShared = 227 << 10;

// A meeting point of a block's or some lanes' threads, at one place at a time.
struct Meeting {
  const char* name = nullptr;
  Place place{"", 0};
  unsigned arrived = 0;
};

struct Thread : Fibre {
  enum State { kReady, kWaiting, kDone };
  State state = kDone;
  unsigned index = 0;
  dim3 at;
  Meeting* waits_at = nullptr;
  Copies copies;
};

struct Slot {
  alignas(16) unsigned char bytes[kSlotBytes];
  template <typename T>
  T get() const {
    T out;
    std::memcpy(&out, bytes, sizeof out);
    return out;
  }
  template <typename T>
  void put(const T& value) {
    static_assert(sizeof(T) <= kSlotBytes);
    std::memcpy(bytes, &value, sizeof value);
  }
};

struct Warp {
  std::map<unsigned, Meeting> meetings;  // by the mask of the lanes that meet
  Slot deposit[kWarpSize], published[kWarpSize];
};

class Machine {
 public:
  Options options;
  dim3 grid, block, block_index;
  std::set<std::pair<std::string, int>> barriers_met;  // of all __syncthreads() and the like

  void launch(dim3 grid_size, unsigned threads, int shared, const std::function<void()>& kernel);

  Thread& self() const { return *current_; }
  unsigned thread() const { return current_->index; }
  unsigned lane() const { return current_->index % kWarpSize; }
  unsigned char* shared() const { return shared_; }

  // Bytes `at` to `at + bytes` of dynamic shared memory, which must lie in it and be aligned.
  unsigned char* shared_at(uint32_t at, uint32_t bytes) {
    if (at % bytes || uint64_t(at) + bytes > uint64_t(shared_bytes_)) {
      fail("no " + std::to_string(bytes) + " bytes at " + std::to_string(at) + " of " +
           std::to_string(shared_bytes_) + " bytes of shared memory");
    }
    return shared_ + at;
  }

  // Whether the barrier there is to be ignored; notes that it was met.
  bool dropped(const char* file, int line) {
    if (line != last_place_.line || file != last_place_.file) {
      last_place_ = {file, line};
      const char* slash = std::strrchr(file, '/');
      last_name_ = slash ? slash + 1 : file;
      barriers_met.emplace(last_name_, line);
    }
    return line == options.dropped_line && last_name_ == options.dropped_file;
  }

  void barrier(const char* file, int line) {
    if (dropped(file, line)) return;
    meet(block_meeting_, {file, line}, live_, "__syncthreads", [] {});
  }

  // A barrier that also counts the threads whose predicate holds.
  unsigned barrier_count(bool predicate, const char* file, int line) {
    counting_ += predicate;
    meet(block_meeting_, {file, line}, live_, "__syncthreads_count",
         [this] { counted_ = std::exchange(counting_, 0); });
    return counted_;
  }

  // Deposits value and waits for all lanes of the mask; last_one(warp) runs when all are there and
  // must fill `published`. Returns the warp.
  template <typename T, typename Last>
  const Warp& gather(unsigned mask, const T& value, const char* name, Place place, Last last_one) {
    Warp& warp = warps_[thread() / kWarpSize];
    if (!(mask >> lane() & 1)) fail(std::string(name) + ": the mask lacks the calling lane");
    warp.deposit[lane()].put(value);
    meet(warp.meetings[mask], place, unsigned(__builtin_popcount(mask)), name,
         [&] { last_one(warp); });
    return warp;
  }

  // Every lane of the mask gives a value; returns the warp, whose published[lane] then hold them.
  template <typename T>
  const Warp& exchange(unsigned mask, const T& value, const char* name, Place place) {
    return gather(mask, value, name, place, [mask](Warp& warp) {
      for (unsigned i = 0; i < kWarpSize; ++i) {
        if (mask >> i & 1) std::memcpy(warp.published[i].bytes, warp.deposit[i].bytes, sizeof(T));
      }
    });
  }

  template <typename T>
  T shuffle(unsigned mask, T value, unsigned from, const char* name, Place place) {
    if (!(mask >> from % kWarpSize & 1)) fail(std::string(name) + ": reads a lane out of the mask");
    return exchange(mask, value, name, place).published[from % kWarpSize].template get<T>();
  }

  // Leaves the fibre for good: launch() throws the message.
  [[noreturn]] void fail(const std::string& message);

 private:
  void run_block();
  void prepare(unsigned threads);
  void meet(Meeting& meeting, Place place, unsigned expected, const char* name,
            const std::function<void()>& then);
  void set_ready(Thread& thread);
  Context& next();
  void hand_over();
  static void enter();

  const std::function<void()>* kernel_ = nullptr;
  std::mt19937 random_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  std::vector<uint64_t> ready_;  // one bit per thread
  Meeting block_meeting_;
  unsigned block_threads_ = 0, live_ = 0, counting_ = 0, counted_ = 0;
  Thread* current_ = nullptr;
  Context host_;
  unsigned char* shared_ = nullptr;
  int shared_bytes_ = 0;
  std::string error_;
  Place last_place_{nullptr, 0};
  std::string last_name_;
};

inline Machine machine;

}  // namespace cuda_host

#include "machine_inline.h"
