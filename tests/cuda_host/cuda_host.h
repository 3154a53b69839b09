// Runs CUDA C++ kernels on the CPU: every CUDA thread is a fibre (ucontext), blocks run one by one.
//
// A fibre runs until it meets a barrier or a warp collective; then the schedule (forward, reverse
// or random) picks the next one. That finds wrong indexing, tails and masks, missing barriers (the
// order decides the result), collectives that not all lanes reach, barriers in divergent code, and
// deadlocks; built with -fsanitize=address,undefined also out-of-bounds and misaligned accesses.
// Not modelled: the memory model between synchronisations, timing, bank conflicts.
//
// Include it first (-include cuda_host.h) and compile the kernel's .cuh as ordinary C++. One host
// thread; __shared__ becomes static, so it holds what the previous block left, as on a GPU.
#pragma once

#include "fibres.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

namespace cuda_host {

// launch(kernel, grid_x, grid_y, threads, arguments...), the shape that activity_stats() asks for.
struct Launch {
  template <typename Kernel, typename... Arguments>
  void operator()(Kernel kernel, int64_t x, int64_t y, int threads, Arguments... arguments) const {
    machine.launch({unsigned(x), unsigned(y), 1}, {unsigned(threads), 1, 1},
                   [=] { kernel(arguments...); });
  }
};

struct Index {
  enum Of { kThread, kBlock };
  struct Axis {
    Of of;
    int axis;
    operator unsigned() const {
      const dim3 b = machine.block, at = machine.block_index;
      if (of == kBlock) return axis == 0 ? at.x : axis == 1 ? at.y : at.z;
      const unsigned t = machine.thread();
      return axis == 0 ? t % b.x : axis == 1 ? t / b.x % b.y : t / b.x / b.y;
    }
  };
  Axis x, y, z;
};

// Lanes that would read past the warp keep their own value.
inline unsigned lane_below(unsigned by) {
  const unsigned lane = machine.thread() % kWarpSize;
  return lane + by < kWarpSize ? lane + by : lane;
}

inline unsigned ballot(unsigned mask, bool predicate, int line) {
  machine.exchange(mask, predicate, 0, "__ballot_sync", line);
  unsigned out = 0;
  for (unsigned i = 0; i < kWarpSize; ++i) out |= unsigned(machine.lane_value<bool>(i)) << i;
  return out;
}

}  // namespace cuda_host

inline const cuda_host::Index threadIdx{{cuda_host::Index::kThread, 0},
                                        {cuda_host::Index::kThread, 1},
                                        {cuda_host::Index::kThread, 2}};
inline const cuda_host::Index blockIdx{{cuda_host::Index::kBlock, 0},
                                       {cuda_host::Index::kBlock, 1},
                                       {cuda_host::Index::kBlock, 2}};
#define blockDim (cuda_host::machine.block)
#define gridDim (cuda_host::machine.grid)

#define __syncthreads() cuda_host::machine.barrier(__LINE__)
#define __syncwarp() \
  ((void)cuda_host::machine.exchange(0xffffffffu, 0, 0, "__syncwarp", __LINE__))
#define __shfl_sync(mask, value, lane) \
  cuda_host::machine.exchange(mask, value, unsigned(lane), "__shfl_sync", __LINE__)
#define __shfl_xor_sync(mask, value, bits)                                                     \
  cuda_host::machine.exchange(mask, value, cuda_host::machine.thread() % 32 ^ unsigned(bits), \
                              "__shfl_xor_sync", __LINE__)
#define __shfl_down_sync(mask, value, by) \
  cuda_host::machine.exchange(mask, value, cuda_host::lane_below(by), "__shfl_down_sync", __LINE__)
#define __ballot_sync(mask, predicate) cuda_host::ballot(mask, bool(predicate), __LINE__)

// Fibres switch only at collectives, so a plain read-modify-write is atomic.
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
