// Runs CUDA C++ kernels on the CPU: every CUDA thread is a fibre, blocks run one by one.
//
// A fibre runs until it meets a barrier or a warp collective; then the schedule (forward, reverse
// or random) picks the next one. That finds wrong indexing, tails and masks, missing barriers (the
// order decides the result), asynchronous copies that nobody waited for, collectives that not all
// lanes reach, barriers in divergent code, and deadlocks; built with -fsanitize=address,undefined
// also out-of-bounds and misaligned accesses. Not modelled: the memory model between
// synchronisations, timing, bank conflicts.
//
// Include it first (-include cuda_host.h) and compile the kernel's source as ordinary C++. One host
// thread; __shared__ becomes static, so it holds what the previous block left, as on a GPU. Dynamic
// shared memory is filled with ones (NaN) before every block and ends where the launch said.
#pragma once

#include <cmath>

#include "intrinsics.h"
#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

using cudaStream_t = void*;

namespace cuda_host {

struct Index {
  unsigned (*of)();
  operator unsigned() const { return of(); }
};
struct Indices {
  Index x, y, z;
};

// Lanes that would read past the segment of `width` lanes keep their own value.
inline unsigned lane_above(unsigned by, unsigned width) {
  const unsigned lane = machine.lane(), start = lane / width * width;
  return lane >= start + by ? lane - by : lane;
}
inline unsigned lane_below(unsigned by, unsigned width) {
  const unsigned lane = machine.lane(), end = lane / width * width + width;
  return lane + by < end ? lane + by : lane;
}
inline unsigned lane_of(unsigned index, unsigned width) {
  return machine.lane() / width * width + index % width;
}
inline unsigned lane_xor(unsigned bits, unsigned width) {
  const unsigned lane = machine.lane(), other = lane ^ bits;
  return other / width <= lane / width ? other % kWarpSize : lane;
}

// Calls fold(value of lane) for every lane of the mask, lowest first.
template <typename T, typename Fold>
void over_lanes(unsigned mask, T value, const char* name, Place place, Fold fold) {
  const Warp& warp = machine.exchange(mask, value, name, place);
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if (mask >> i & 1) fold(i, warp.published[i].get<T>());
  }
}

inline unsigned ballot(unsigned mask, bool predicate, const char* name, Place place) {
  unsigned out = 0;
  over_lanes(mask, predicate, name, place, [&](unsigned i, bool p) { out |= unsigned(p) << i; });
  return out;
}

template <typename T>
unsigned match(unsigned mask, T value, const char* name, Place place) {
  unsigned out = 0;
  over_lanes(mask, value, name, place,
             [&](unsigned i, T v) { out |= unsigned(v == value) << i; });
  return out;
}

template <typename T, typename Fold>
T reduce(unsigned mask, T value, const char* name, Place place, Fold fold) {
  bool first = true;
  T out{};
  over_lanes(mask, value, name, place, [&](unsigned, T v) {
    out = std::exchange(first, false) ? v : fold(out, v);
  });
  return out;
}

inline void sync_warp(Place place, unsigned mask = kFullMask) {
  if (!machine.dropped(place.file, place.line)) machine.exchange(mask, 0, "__syncwarp", place);
}

}  // namespace cuda_host

#define LW_HERE (cuda_host::Place{__FILE__, __LINE__})

inline const cuda_host::Indices threadIdx{{[] { return cuda_host::machine.self().at.x; }},
                                          {[] { return cuda_host::machine.self().at.y; }},
                                          {[] { return cuda_host::machine.self().at.z; }}};
inline const cuda_host::Indices blockIdx{{[] { return cuda_host::machine.block_index.x; }},
                                         {[] { return cuda_host::machine.block_index.y; }},
                                         {[] { return cuda_host::machine.block_index.z; }}};
#define blockDim (cuda_host::machine.block)
#define gridDim (cuda_host::machine.grid)

#define __syncthreads() cuda_host::machine.barrier(__FILE__, __LINE__)
#define __syncthreads_count(p) int(cuda_host::machine.barrier_count(bool(p), __FILE__, __LINE__))
#define __syncthreads_or(p) int(__syncthreads_count(p) > 0)
#define __syncthreads_and(p) int(__syncthreads_count(!(p)) == 0)
#define __syncwarp(...) cuda_host::sync_warp(LW_HERE __VA_OPT__(, ) __VA_ARGS__)
#define __activemask() cuda_host::kFullMask

namespace cuda_host {
// The optional last argument of the shuffles.
inline unsigned lanes(unsigned by, unsigned (*from)(unsigned, unsigned), unsigned width = 32) {
  return from(by, width);
}
}  // namespace cuda_host

#define LW_SHUFFLE(name, from, mask, value, by, ...)                                     \
  cuda_host::machine.shuffle(                                                            \
      mask, value, cuda_host::lanes(unsigned(by), cuda_host::from __VA_OPT__(, ) __VA_ARGS__), \
      name, LW_HERE)
#define __shfl_sync(mask, value, ...) \
  LW_SHUFFLE("__shfl_sync", lane_of, mask, value, __VA_ARGS__)
#define __shfl_xor_sync(mask, value, ...) \
  LW_SHUFFLE("__shfl_xor_sync", lane_xor, mask, value, __VA_ARGS__)
#define __shfl_up_sync(mask, value, ...) \
  LW_SHUFFLE("__shfl_up_sync", lane_above, mask, value, __VA_ARGS__)
#define __shfl_down_sync(mask, value, ...) \
  LW_SHUFFLE("__shfl_down_sync", lane_below, mask, value, __VA_ARGS__)
#define __ballot_sync(mask, p) cuda_host::ballot(mask, bool(p), "__ballot_sync", LW_HERE)
#define __any_sync(mask, p) int(cuda_host::ballot(mask, bool(p), "__any_sync", LW_HERE) != 0)
#define __all_sync(mask, p) \
  int(cuda_host::ballot(mask, bool(p), "__all_sync", LW_HERE) == unsigned(mask))
#define __match_any_sync(mask, value) \
  cuda_host::match(mask, value, "__match_any_sync", LW_HERE)
#define LW_REDUCE(name, mask, value, result) \
  cuda_host::reduce(mask, value, name, LW_HERE, [](auto a, auto b) { return result; })
#define __reduce_add_sync(mask, value) LW_REDUCE("__reduce_add_sync", mask, value, a + b)
#define __reduce_min_sync(mask, value) LW_REDUCE("__reduce_min_sync", mask, value, b < a ? b : a)
#define __reduce_max_sync(mask, value) LW_REDUCE("__reduce_max_sync", mask, value, a < b ? b : a)
#define __reduce_and_sync(mask, value) LW_REDUCE("__reduce_and_sync", mask, value, a & b)
#define __reduce_or_sync(mask, value) LW_REDUCE("__reduce_or_sync", mask, value, a | b)
#define __reduce_xor_sync(mask, value) LW_REDUCE("__reduce_xor_sync", mask, value, a ^ b)
