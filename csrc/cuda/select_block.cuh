// What the threads of a selecting block do together: reductions, scans, and the histogram.
#pragma once

#include <cstdint>

#include "select_keys.cuh"

namespace liveweight::cuda {

constexpr int kWarpLanes = 32;
constexpr uint32_t kNoRank = 0xffffffffu;
constexpr unsigned long long kNoIndex = ~0ull;
constexpr int kFew = 64;  // keys that are ranked one against another instead of split again

// Where the walk reaches its target.
struct Pivot {
  uint32_t key;
  uint32_t kept, ties;  // how many of the `ties` elements with this key are kept
};

// A bucket of the histogram: its elements, and the sum over the buckets above it.
struct Crossing {
  uint32_t bucket, count;
  double above;
};

struct BlockState {
  double sums[kWarpLanes];         // one per warp
  uint32_t words[2][kWarpLanes];   // one per warp
  uint32_t first, last;            // ranks of buckets
  uint32_t found;
  uint32_t few[kFew];
  double above;
  Pivot pivot;
};

__device__ inline int lane_index() { return int(threadIdx.x) % kWarpLanes; }
__device__ inline int warp_index() { return int(threadIdx.x) / kWarpLanes; }

// redux.sync
__device__ inline uint32_t warp_max(uint32_t value) {
#if defined(__CUDA_ARCH__)
  return __reduce_max_sync(kAllLanes, value);
#else
  for (int by = 16; by; by /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, value, by);
    value = other > value ? other : value;
  }
  return value;
#endif
}
__device__ inline uint32_t warp_sum(uint32_t value) {
#if defined(__CUDA_ARCH__)
  return __reduce_add_sync(kAllLanes, value);
#else
  for (int by = 16; by; by /= 2) value += __shfl_xor_sync(kAllLanes, value, by);
  return value;
#endif
}

template <class T>
__device__ inline T warp_inclusive_sum(T value) {
  const int lane = lane_index();
#pragma unroll
  for (int by = 1; by < kWarpLanes; by *= 2) {
    const T other = __shfl_sync(kAllLanes, value, lane >= by ? lane - by : lane);
    if (lane >= by) value += other;
  }
  return value;
}

// Counts of keys, and the sums of their offsets from the bucket's base, in shared memory. All
// numbers are integers, so neither the order of the atomics nor rounding decides anything.
struct Histogram {
  uint32_t* count;
  uint32_t* offsets;  // mass only; sums modulo 2^32
  uint32_t* carries;  // mass only; their upper halves
  uint32_t most;                   // buckets that there is memory for
  uint32_t buckets, first, shift;  // bucket b holds the keys with key >> shift == first + b

  // Chooses the narrowest buckets that cover low..high.
  __device__ void cover(uint32_t low, uint32_t high) {
    shift = 0;
    while ((high >> shift) - (low >> shift) >= most) ++shift;
    first = low >> shift;
    buckets = (high >> shift) - first + 1;
  }
  __device__ uint32_t base(uint32_t bucket) const { return (first + bucket) << shift; }
  __device__ uint32_t mask() const { return (1u << shift) - 1; }

  template <class Rule>
  __device__ void clear() {
    for (uint32_t b = threadIdx.x; b < buckets; b += blockDim.x) {
      count[b] = 0;
      if constexpr (Rule::kMass) offsets[b] = carries[b] = 0;
    }
  }
  __device__ bool covers(uint32_t key) const {
    return key != 0 && (key >> shift) - first < buckets;
  }
  // kWide: the offsets of a row can pass 2^32.
  template <class Rule, bool kWide>
  __device__ void add(uint32_t key) {
    const uint32_t bucket = (key >> shift) - first;
    atomicAdd(&count[bucket], 1u);
    if constexpr (Rule::kMass) {
      const uint32_t offset = key & mask();
      const uint32_t old = atomicAdd(&offsets[bucket], offset);
      if (kWide && old > ~offset) atomicAdd(&carries[bucket], 1u);
    }
  }
  template <class Rule>
  __device__ double sum(uint32_t bucket) const {
    const uint32_t held = count[bucket];
    if (!Rule::kMass || held == 0) return double(held);  // the base of an empty one can be inf
    const double low = double(carries[bucket]) * 0x1p32 + double(offsets[bucket]);
    return sum_of_floats(base(bucket), double(held), low);
  }
};

// Sums over the buckets, the highest first: each thread owns a run of them.
struct Walk {
  uint32_t begin, end;  // ranks: rank r is bucket (buckets - 1 - r)
  double before;        // over the buckets of lower rank, `above` included
  double total;         // `above` and all buckets
};

template <class Rule>
__device__ inline Walk scan_buckets(const Histogram& histogram, double above, BlockState& state) {
  const uint32_t last = histogram.buckets - 1;
  const uint32_t run = (histogram.buckets + blockDim.x - 1) / blockDim.x;
  Walk walk;
  walk.begin = min(threadIdx.x * run, histogram.buckets);
  walk.end = min(walk.begin + run, histogram.buckets);
  double sum = 0;
  for (uint32_t r = walk.begin; r < walk.end; ++r) sum += histogram.sum<Rule>(last - r);
  const int lane = lane_index(), warp = warp_index();
  const double inclusive = warp_inclusive_sum(sum);
  const double exclusive = __shfl_sync(kAllLanes, inclusive, (lane + 31) % kWarpLanes);
  if (lane == kWarpLanes - 1) state.sums[warp] = inclusive;
  if (threadIdx.x == 0) {
    state.first = kNoRank;
    state.last = 0;
    state.found = 0;
  }
  __syncthreads();
  const bool there = lane < int(blockDim.x) / kWarpLanes;
  const double warps = warp_inclusive_sum(there ? state.sums[lane] : 0.0);
  const double others = __shfl_sync(kAllLanes, warps, (warp + 31) % kWarpLanes);
  walk.before = above + ((warp ? others : 0.0) + (lane ? exclusive : 0.0));
  walk.total = above + __shfl_sync(kAllLanes, warps, kWarpLanes - 1);
  return walk;
}

// The highest bucket at which the walk reaches the target; where rounding leaves it out of reach,
// the lowest one that holds anything.
template <class Rule>
__device__ inline Crossing find_crossing(const Histogram& histogram, const Walk& walk,
                                         double target, BlockState& state) {
  const uint32_t last = histogram.buckets - 1;
  double sum = walk.before;
  for (uint32_t r = walk.begin; r < walk.end; ++r) {
    if (histogram.count[last - r] == 0) continue;
    sum += histogram.sum<Rule>(last - r);
    atomicMax(&state.last, r);
    if (sum >= target) {
      atomicMin(&state.first, r);
      break;
    }
  }
  __syncthreads();
  const uint32_t rank = state.first == kNoRank ? state.last : state.first;
  if (rank >= walk.begin && rank < walk.end) {
    double above = walk.before;
    for (uint32_t r = walk.begin; r < rank; ++r) above += histogram.sum<Rule>(last - r);
    state.above = above;
  }
  const uint32_t count = histogram.count[last - rank];  // before the next clear()
  __syncthreads();
  return {last - rank, count, state.above};
}

// What the walk has added up after `count` elements of a bucket whose offsets sum to `offsets`.
template <class Rule>
__device__ inline double reached(double above, uint32_t base, uint32_t count, uint64_t offsets) {
  if constexpr (!Rule::kMass) return above + double(count);
  return above + sum_of_floats(base, double(count), double(offsets));
}

// The fewest of `ties` elements of one key, 1 at least, with which the walk reaches the target;
// `count` elements of the bucket come before them.
template <class Rule>
__device__ inline uint32_t split_ties(double above, uint32_t base, uint32_t count,
                                      uint64_t offsets, uint32_t offset, uint32_t ties,
                                      double target) {
  uint32_t low = 1, high = ties;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    const uint64_t extra = uint64_t(middle) * offset;
    const double sum = reached<Rule>(above, base, count + middle, offsets + extra);
    if (sum >= target) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Finds the pivot among state.few[0..count), the keys of one bucket: each thread ranks one.
template <class Rule>
__device__ inline void rank_few(uint32_t count, double above, uint32_t base, double target,
                                BlockState& state) {
  for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
    const uint32_t key = state.few[i];
    uint32_t larger = 0, ties = 0, earlier = 0;
    uint64_t offsets = 0;
    for (uint32_t j = 0; j < count; ++j) {
      const uint32_t other = state.few[j];
      larger += other > key;
      offsets += other > key ? other - base : 0;
      ties += other == key;
      earlier += other == key && j < i;
    }
    if (earlier) continue;  // its first copy decides
    const uint32_t offset = key - base;
    const double before = reached<Rule>(above, base, larger, offsets);
    const double after =
        reached<Rule>(above, base, larger + ties, offsets + uint64_t(ties) * offset);
    // As for the buckets: the first that reaches the target, the last where none does.
    if ((larger == 0 || before < target) && (after >= target || larger + ties == count)) {
      const uint32_t kept =
          split_ties<Rule>(above, base, larger, offsets, offset, ties, target);
      state.pivot = {key, kept, ties};
    }
  }
}

}  // namespace liveweight::cuda
