// The scheduler of machine.h.
#pragma once

#include "machine.h"

namespace cuda_host {

inline void Machine::launch(dim3 grid_size, unsigned threads, int shared,
                            const std::function<void()>& kernel) {
  const size_t count = size_t(grid_size.x) * grid_size.y * grid_size.z;
  if (threads == 0 || threads > 1024 || threads % kWarpSize) {
    throw std::runtime_error("block of " + std::to_string(threads) + " threads");
  }
  if (count == 0 || grid_size.y > 65535 || grid_size.z > 65535 || grid_size.x > 0x7fffffffu) {
    throw std::runtime_error("grid of " + std::to_string(grid_size.x) + " x " +
                             std::to_string(grid_size.y) + " x " + std::to_string(grid_size.z));
  }
  if (shared < 0 || shared > kMostShared) {
    throw std::runtime_error(std::to_string(shared) + " bytes of dynamic shared memory");
  }
  grid = grid_size;
  block = dim3(threads);
  kernel_ = &kernel;
  random_.seed(options.seed);
  std::vector<unsigned> blocks(count);
  for (unsigned i = 0; i < count; ++i) blocks[i] = i;
  if (options.order == Order::kReverse) std::reverse(blocks.begin(), blocks.end());
  if (options.order == Order::kRandom) std::shuffle(blocks.begin(), blocks.end(), random_);
  // Exactly so many bytes, so that AddressSanitizer sees the first one behind them.
  void* memory = nullptr;
  if (shared && posix_memalign(&memory, 16, size_t(shared))) throw std::bad_alloc();
  const std::unique_ptr<void, decltype(&std::free)> owner(memory, &std::free);
  shared_ = static_cast<unsigned char*>(memory);
  shared_bytes_ = shared;
  prepare(threads);
  for (unsigned i : blocks) {
    block_index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    if (shared) std::memset(memory, 0xff, size_t(shared));  // NaN in every type
    run_block();
  }
}

inline void Machine::prepare(unsigned threads) {
  block_threads_ = threads;
  error_.clear();
  for (unsigned i = unsigned(threads_.size()); i < threads; ++i) {
    threads_.push_back(std::make_unique<Thread>());
    threads_[i]->index = i;
    threads_[i]->at = dim3(i, 0, 0);
    threads_[i]->prepare(&Machine::enter);
  }
  ready_.assign((threads + 63) / 64, 0);
  warps_.resize(threads / kWarpSize);
}

inline void Machine::run_block() {
  block_meeting_ = {};
  counting_ = 0;
  for (Warp& warp : warps_) warp.meetings.clear();
  live_ = block_threads_;
  for (unsigned i = 0; i < block_threads_; ++i) set_ready(*threads_[i]);
  switch_context(host_, next());
  current_ = nullptr;
  if (error_.empty() && live_ > 0) {
    error_ = "deadlock: " + std::to_string(live_) + " threads wait (barrier at line " +
             std::to_string(block_meeting_.place.line) + ", " +
             std::to_string(block_meeting_.arrived) + " arrived)";
  }
  if (error_.empty()) return;
  threads_.clear();  // they stand in the middle of the kernel
  throw std::runtime_error(error_);
}

inline void Machine::set_ready(Thread& thread) {
  thread.state = Thread::kReady;
  ready_[thread.index / 64] |= uint64_t(1) << thread.index % 64;
}

// The context to go on with: a ready thread, by the order of the schedule, or the host.
inline Context& Machine::next() {
  current_ = nullptr;
  if (!error_.empty()) return host_;
  const unsigned words = unsigned(ready_.size());
  const bool down = options.order == Order::kReverse;
  const bool random = options.order == Order::kRandom;
  const unsigned turn = random ? unsigned(random_()) : 0;
  for (unsigned i = 0; i < words; ++i) {
    const unsigned word = down ? words - 1 - i : (i + (turn >> 8)) % words;
    uint64_t bits = ready_[word];
    if (!bits) continue;
    const unsigned shift = random ? turn % 64 : 0;
    const uint64_t above = bits >> shift << shift;  // some of those, or else of all
    if (above) bits = above;
    const int bit = down ? 63 - __builtin_clzll(bits) : __builtin_ctzll(bits);
    ready_[word] &= ~(uint64_t(1) << bit);
    current_ = threads_[word * 64 + unsigned(bit)].get();
    return *current_;
  }
  return host_;
}

inline void Machine::hand_over() {
  Thread& me = *current_;
  switch_context(me, next());
}

inline void Machine::meet(Meeting& meeting, Place place, unsigned expected, const char* name,
                          const std::function<void()>& then) {
  const bool same = meeting.name == name && meeting.place == place;
  if (meeting.arrived && !same) {
    fail(std::string(name) + " at line " + std::to_string(place.line) +
         " while others wait at line " + std::to_string(meeting.place.line));
  }
  meeting.name = name;
  meeting.place = place;
  if (++meeting.arrived < expected) {
    current_->state = Thread::kWaiting;
    current_->waits_at = &meeting;
    hand_over();
    return;
  }
  if (&meeting == &block_meeting_ && expected < block_threads_) {
    fail(std::string(name) + " at line " + std::to_string(place.line) +
         " after a thread has returned");
  }
  then();
  meeting.arrived = 0;
  // A warp's meeting is of threads next to each other; the block's may be of all.
  const unsigned first = &meeting == &block_meeting_ ? 0 : thread() / kWarpSize * kWarpSize;
  const unsigned end = &meeting == &block_meeting_ ? block_threads_ : first + kWarpSize;
  for (unsigned i = first; i < end; ++i) {
    Thread& other = *threads_[i];
    if (other.state == Thread::kWaiting && other.waits_at == &meeting) set_ready(other);
  }
}

inline void Machine::fail(const std::string& message) {
  error_ = message + " (block " + std::to_string(block_index.x) + ", thread " +
           std::to_string(thread()) + ")";
  current_->state = Thread::kDone;
  while (true) hand_over();
}

inline void Machine::enter() {
  arrived(nullptr);
  while (true) {
    (*machine.kernel_)();
    Thread& me = *machine.current_;
    if (!me.copies.empty()) machine.fail("a thread returned before it waited for its cp.async");
    me.copies.clear();
    me.state = Thread::kDone;
    --machine.live_;
    const Meeting& meeting = machine.block_meeting_;
    if (meeting.arrived && meeting.arrived == machine.live_) {
      machine.fail("a thread returned while all others wait at " + std::string(meeting.name) +
                   " of line " + std::to_string(meeting.place.line));
    }
    machine.hand_over();
  }
}

}  // namespace cuda_host
