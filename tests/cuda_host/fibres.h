// The machine of cuda_host.h: fibres, their schedule, barriers and warp collectives.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace cuda_host {

enum class Order { kForward, kReverse, kRandom };

struct Options {
  Order order = Order::kForward;
  unsigned seed = 0;
  int dropped_barrier = 0;  // source line of a __syncthreads() to ignore; 0: none
};

inline constexpr int kWarpSize = 32;
inline constexpr size_t kStackBytes = 128 << 10;
inline constexpr size_t kSlotBytes = 8;  // widest value that a collective exchanges

struct Fibre {
  enum State { kReady, kWaiting, kDone };
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = kDone;
  unsigned index = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// A meeting point of a block's or a warp's threads, at one source line.
struct Meeting {
  int line = 0;
  unsigned arrived = 0;
};

struct Warp {
  Meeting meeting;
  unsigned char deposit[kWarpSize][kSlotBytes];
  unsigned char published[kWarpSize][kSlotBytes];
};

class Machine {
 public:
  Options options;
  dim3 grid, block, block_index;
  std::set<int> barrier_lines;  // lines of all __syncthreads() met so far

  void launch(dim3 grid_size, dim3 block_size, const std::function<void()>& kernel) {
    grid = grid_size;
    block = block_size;
    random_.seed(options.seed);
    std::vector<unsigned> blocks(size_t(grid.x) * grid.y * grid.z);
    for (unsigned i = 0; i < blocks.size(); ++i) blocks[i] = i;
    if (options.order == Order::kReverse) std::reverse(blocks.begin(), blocks.end());
    if (options.order == Order::kRandom) std::shuffle(blocks.begin(), blocks.end(), random_);
    for (unsigned i : blocks) {
      block_index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
      run_block(kernel);
    }
  }

  unsigned thread() const { return current_->index; }

  void barrier(int line) {
    barrier_lines.insert(line);
    if (line == options.dropped_barrier) return;
    meet(block_meeting_, line, live_, "__syncthreads", [](const Fibre&) { return true; });
  }

  // Deposits value, waits for all lanes of the warp, returns what lane `from` deposited.
  template <typename T>
  T exchange(unsigned mask, T value, unsigned from, const char* name, int line) {
    static_assert(sizeof(T) <= kSlotBytes);
    if (mask != 0xffffffffu) fail(std::string(name) + ": only full masks are modelled");
    const unsigned me = thread() / kWarpSize;
    Warp& warp = warps_[me];
    std::memcpy(warp.deposit[thread() % kWarpSize], &value, sizeof value);
    meet(warp.meeting, line, kWarpSize, name,
         [me](const Fibre& f) { return f.index / kWarpSize == me; },
         [&warp] { std::memcpy(warp.published, warp.deposit, sizeof warp.deposit); });
    T out;
    std::memcpy(&out, warp.published[from % kWarpSize], sizeof out);
    return out;
  }

  template <typename T>
  T lane_value(unsigned lane) const {
    T out;
    std::memcpy(&out, warps_[thread() / kWarpSize].published[lane], sizeof out);
    return out;
  }

 private:
  void run_block(const std::function<void()>& kernel) {
    const unsigned threads = block.x * block.y * block.z;
    if (threads == 0 || threads > 1024 || threads % kWarpSize) {
      throw std::runtime_error("block of " + std::to_string(threads) + " threads");
    }
    kernel_ = &kernel;
    error_.clear();
    block_meeting_ = {};
    warps_.assign(threads / kWarpSize, {});
    fibres_.resize(std::max<size_t>(fibres_.size(), threads));
    live_ = threads;
    ready_.clear();
    for (unsigned i = 0; i < threads; ++i) start(i);
    while (!ready_.empty() && error_.empty()) resume(fibres_[pick()]);
    if (error_.empty() && live_ > 0) {
      error_ = "deadlock: " + std::to_string(live_) + " threads wait (barrier at line " +
               std::to_string(block_meeting_.line) + ", " +
               std::to_string(block_meeting_.arrived) + " arrived)";
    }
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  void start(unsigned i) {
    Fibre& fibre = fibres_[i];
    fibre.index = i;
    fibre.fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    // The frames that the last block's fibre never left are gone; so must be their red zones.
    __asan_unpoison_memory_region(fibre.stack.get(), kStackBytes);
#endif
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStackBytes;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, &Machine::enter, 0);
    fibre.state = Fibre::kReady;
    ready_.push_back(i);
  }

  unsigned pick() {
    auto chosen = ready_.begin() + random_() % ready_.size();
    if (options.order == Order::kForward) chosen = std::min_element(ready_.begin(), ready_.end());
    if (options.order == Order::kReverse) chosen = std::max_element(ready_.begin(), ready_.end());
    const unsigned i = *chosen;
    *chosen = ready_.back();
    ready_.pop_back();
    return i;
  }

  template <typename Member, typename Then = void (*)()>
  void meet(Meeting& meeting, int line, unsigned expected, const char* name, Member member,
            Then then = [] {}) {
    if (meeting.arrived && meeting.line != line) {
      fail(std::string(name) + " at line " + std::to_string(line) + " while others wait at line " +
           std::to_string(meeting.line));
    }
    meeting.line = line;
    if (++meeting.arrived < expected) {
      current_->state = Fibre::kWaiting;
      wait();
      return;
    }
    if (expected < block.x * block.y * block.z && &meeting == &block_meeting_) {
      fail("__syncthreads at line " + std::to_string(line) + " after a thread has returned");
    }
    then();
    meeting.arrived = 0;
    for (unsigned i = 0; i < block.x * block.y * block.z; ++i) {
      Fibre& other = fibres_[i];
      if (other.state == Fibre::kWaiting && member(other)) {
        other.state = Fibre::kReady;
        ready_.push_back(i);
      }
    }
  }

  // Leaves the fibre for good: the scheduler throws the message in the launching context.
  [[noreturn]] void fail(const std::string& message) {
    error_ = message + " (block " + std::to_string(block_index.x) + ", thread " +
             std::to_string(thread()) + ")";
    current_->state = Fibre::kDone;
    while (true) wait();
  }

  static void enter();

  void resume(Fibre& fibre) {
    current_ = &fibre;
    switch_stack(&scheduler_fake_stack_, fibre.stack.get(), kStackBytes);
    swapcontext(&scheduler_, &fibre.context);
    switched(scheduler_fake_stack_);
    current_ = nullptr;
  }

  void wait() {
    Fibre& fibre = *current_;
    switch_stack(fibre.state == Fibre::kDone ? nullptr : &fibre.fake_stack, scheduler_stack_,
                 scheduler_stack_bytes_);
    swapcontext(&fibre.context, &scheduler_);
    switched(fibre.fake_stack);
  }

#if defined(__SANITIZE_ADDRESS__)
  void switch_stack(void** save, const void* bottom, size_t bytes) {
    __sanitizer_start_switch_fiber(save, bottom, bytes);
  }
  void switched(void* fake) { __sanitizer_finish_switch_fiber(fake, nullptr, nullptr); }
  void first_switch() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_stack_bytes_);
  }
#else
  void switch_stack(void**, const void*, size_t) {}
  void switched(void*) {}
  void first_switch() {}
#endif

  const std::function<void()>* kernel_ = nullptr;
  std::mt19937 random_;
  std::vector<Fibre> fibres_;
  std::vector<unsigned> ready_;
  std::vector<Warp> warps_;
  Meeting block_meeting_;
  unsigned live_ = 0;
  Fibre* current_ = nullptr;
  ucontext_t scheduler_;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  std::string error_;
};

inline Machine machine;

inline void Machine::enter() {
  machine.first_switch();
  (*machine.kernel_)();
  machine.current_->state = Fibre::kDone;
  --machine.live_;
  if (machine.block_meeting_.arrived && machine.block_meeting_.arrived == machine.live_) {
    machine.fail("a thread returned while all others wait at __syncthreads of line " +
                 std::to_string(machine.block_meeting_.line));
  }
  while (true) machine.wait();
}

}  // namespace cuda_host
