// Selection per row without a sort: a block per row, straight to a mask or its bits.
//
// The row's keys stay in shared memory, each thread's in places of its own (longer rows are read
// again, mostly from L2). A histogram of up to 2048 buckets over the range of the keys finds the
// bucket in which the walk from the top reaches its target; that bucket is split again until one
// key, or at most kFew elements to be ranked one against another, are left. Under the mass rule a
// bucket holds the number of its elements and the sum of their offsets from its base, so its sum
// is exact, and the result does not depend on the order of the atomics.
//
// Floor: one read of the scores and one write of the mask. 4096 x 14336 float32 is 235 MB + 59 MB
// (7 MB as bits): 68 us (56 us) at the 4.3 TB/s that an H200 copies with. Shared memory is the
// other bound: per element two atomics (count: one) to random banks, and five passes at 128 bytes
// per clock. The 81 KB of such a row leave room for two blocks on a multiprocessor, so that one
// loads while the other searches. The machine code (sm_90a, aligned rows) takes about 29
// instructions per score: 7 to read it, 11 to count it, 5 to gather the few, 6 to write the mask;
// 58 us of an H200's issue slots for that matrix. From bf16 weights (Signals) half is read.
#pragma once

#include <cstdint>

#include "launch.cuh"
#include "select_row_keys.cuh"

namespace liveweight::cuda {

// Where the result goes: bytes [rows, columns] or bits [rows, ceil(columns / 32)], and the smallest
// row that holds an invalid score (its mask is not written). A column more than the mask has is
// that of the bias.
struct RowMask {
  int columns;
  uint8_t* bytes;
  uint32_t* words;
  uint8_t* bias;  // [rows] or null
  unsigned long long* bad_row;
};

struct KeyRange {
  uint32_t low, high;  // of the elements that are there; high = 0: there are none
};

// The smallest and largest of each thread's two numbers, over the block.
__device__ inline KeyRange reduce_range(uint32_t low, uint32_t high, BlockState& state) {
  low = ~warp_max(~low);
  high = warp_max(high);
  if (lane_index() == 0) {
    state.words[0][warp_index()] = ~low;
    state.words[1][warp_index()] = high;
  }
  __syncthreads();
  const bool there = lane_index() < int(blockDim.x) / kWarpLanes;
  return {~warp_max(there ? state.words[0][lane_index()] : 0),
          warp_max(there ? state.words[1][lane_index()] : 0)};
}

template <class AllKeys>
__device__ inline KeyRange range_of(const AllKeys& keys, BlockState& state) {
  uint32_t low = kNoRank, high = 0;
  keys.stage([&](uint32_t key) {
    low = min(low, key - 1);  // 0, no element, becomes the largest
    high = max(high, key);
  });
  const KeyRange range = reduce_range(low, high, state);
  return {range.low + 1, range.high};
}

// Adds the keys that the histogram covers. The first time those are all but the zeros, so a thread
// asks for its four neighbours at once.
template <class Rule, class AllKeys>
__device__ inline void fill(Histogram& histogram, const AllKeys& keys, bool wide) {
  if (Rule::kMass && wide) {
    keys.each([&](uint32_t key) {
      if (histogram.covers(key)) histogram.add<Rule, true>(key);
    });
    return;
  }
  keys.template each_unit<2>([&](int, const uint32_t (&key)[kColumns]) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) all &= histogram.covers(key[i]);
    if (all) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) histogram.add<Rule, false>(key[i]);
      return;
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (histogram.covers(key[i])) histogram.add<Rule, false>(key[i]);
    }
  });
}

// The pivot of a row that holds elements with keys low..high.
template <class Rule, class AllKeys>
__device__ inline Pivot find_pivot(const AllKeys& keys, const Rule& rule, KeyRange range,
                                   int columns, Histogram histogram, BlockState& state) {
  double above = 0, target = 0;
  for (bool whole = true;; whole = false) {
    histogram.cover(range.low, range.high);
    histogram.clear<Rule>();
    __syncthreads();
    fill<Rule>(histogram, keys, uint64_t(columns) << histogram.shift >> 32);
    __syncthreads();
    const Walk walk = scan_buckets<Rule>(histogram, above, state);
    if (whole) target = rule.target(walk.total);
    const Crossing crossing = find_crossing<Rule>(histogram, walk, target, state);
    const uint32_t base = histogram.base(crossing.bucket);
    above = crossing.above;
    if (histogram.shift == 0) {
      return {base, split_ties<Rule>(above, base, 0, 0, 0, crossing.count, target), crossing.count};
    }
    range = {base, base | histogram.mask()};
    if (crossing.count > kFew) continue;
    keys.template each<2>([&](uint32_t key) {
      const bool inside = key != 0 && key - range.low <= histogram.mask();
      if (inside) state.few[atomicAdd(&state.found, 1u)] = key;
    });
    __syncthreads();
    rank_few<Rule>(crossing.count, above, base, target, state);
    __syncthreads();
    return state.pivot;
  }
}

// The key that follows the kept ones in descending order, as the authors' program finds it: what
// is above it stays. 0 where that is a zero; the smallest key where nothing follows.
template <class AllKeys>
__device__ inline uint32_t next_key(const AllKeys& keys, Pivot pivot, int columns,
                                    BlockState& state) {
  if (pivot.kept < pivot.ties) return pivot.key;
  uint32_t below = 0, there = 0;
  keys.each([&](uint32_t key) {
    below = key < pivot.key ? max(below, key) : below;
    there += key != 0;
  });
  below = warp_max(below);
  there = warp_sum(there);
  if (lane_index() == 0) {
    state.words[0][warp_index()] = below;
    state.words[1][warp_index()] = there;
  }
  __syncthreads();
  const bool mine = lane_index() < int(blockDim.x) / kWarpLanes;
  below = warp_max(mine ? state.words[0][lane_index()] : 0);
  there = warp_sum(mine ? state.words[1][lane_index()] : 0);
  return below == 0 && there == uint32_t(columns) ? pivot.key : below;
}

// Writes the mask of one unit: bit i of `bits` is the thread's column + i.
__device__ inline void write_unit(const RowMask& mask, int64_t row, int column, uint32_t bits) {
  const int columns = mask.columns, to_bias = columns - column;
  if (mask.bias && unsigned(to_bias) < unsigned(kColumns)) {
    mask.bias[row] = bits >> to_bias & 1;
    bits &= (1u << to_bias) - 1;
  }
  if (mask.words) {
    uint32_t word = bits << lane_index() % 8 * kColumns;
    for (int by = 1; by < 8; by *= 2) word |= __shfl_xor_sync(kAllLanes, word, by);
    if (lane_index() % 8 == 0 && column < columns) {
      mask.words[row * ((columns + 31) / 32) + column / 32] = word;
    }
    return;
  }
  uint8_t* to = mask.bytes + row * columns + column;
  if (columns % kColumns == 0) {
    // Bit i moves to byte i.
    if (column < columns) *reinterpret_cast<uint32_t*>(to) = bits * 0x00204081u & 0x01010101u;
    return;
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    if (column + i < columns) to[i] = bits >> i & 1;
  }
}

template <class AllKeys>
__device__ inline void write_above(const AllKeys& keys, const RowMask& mask, uint32_t least) {
  keys.template each_unit<2>([&](int column, const uint32_t (&key)[kColumns]) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) bits |= uint32_t(key[i] >= least) << i;
    write_unit(mask, keys.row, column, bits);
  });
}

// How many elements with the pivot's key the warps before this one have.
template <class AllKeys>
__device__ inline uint32_t ties_before(const AllKeys& keys, uint32_t pivot, BlockState& state) {
  uint32_t ties = 0;
  keys.each([&](uint32_t key) { ties += key == pivot; });
  ties = warp_sum(ties);
  if (lane_index() == 0) state.words[0][warp_index()] = ties;
  __syncthreads();
  return warp_sum(lane_index() < warp_index() ? state.words[0][lane_index()] : 0);
}

// Keeps what is above the pivot and its first `kept` copies.
template <class AllKeys>
__device__ inline void write_some_ties(const AllKeys& keys, const RowMask& mask, Pivot pivot,
                                       BlockState& state) {
  uint32_t before = ties_before(keys, pivot.key, state);
  const uint32_t lower_lanes = (1u << lane_index()) - 1;
  keys.each_unit([&](int column, const uint32_t (&key)[kColumns]) {
    uint32_t of_warp = 0, mine = before;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const uint32_t equal = __ballot_sync(kAllLanes, key[i] == pivot.key);
      of_warp += __popc(equal);
      mine += __popc(equal & lower_lanes);
    }
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const bool equal = key[i] == pivot.key;
      bits |= uint32_t(key[i] > pivot.key || (equal && mine < pivot.kept)) << i;
      mine += equal;
    }
    write_unit(mask, keys.row, column, bits);
    before += of_warp;
  });
}

// A block per row. Dynamic shared memory: the histogram and, where kStaged, the keys.
template <class Rule, class Source, bool kStaged>
__global__ void __launch_bounds__(1024, 1)
    select_rows(Source source, Rule rule, RowPlan plan, RowMask mask) {
  __shared__ BlockState state;
  LW_DYNAMIC_SHARED(memory);
  uint32_t* counts = reinterpret_cast<uint32_t*>(memory);
  const int64_t row = blockIdx.x;
  const Keys<Rule, Source, kStaged> keys(source, plan, row,
                                         counts + plan.buckets * (Rule::kMass ? 3 : 1));
  const KeyRange range = range_of(keys, state);
  if (range.high > Rule::kLargest) {
    if (threadIdx.x == 0) atomicMin(mask.bad_row, (unsigned long long)row);
    return;
  }
  if (range.high == 0 || rule.nothing()) {
    return write_above(keys, mask, kNoRank);
  }
  if (rule.everything()) return write_above(keys, mask, range.low);
  const Histogram histogram{counts, counts + plan.buckets, counts + 2 * plan.buckets,
                            uint32_t(plan.buckets), 0, 0, 0};
  const Pivot pivot = find_pivot(keys, rule, range, plan.columns, histogram, state);
  if (rule.authors) {
    write_above(keys, mask, next_key(keys, pivot, plan.columns, state) + 1);
  } else if (pivot.kept == pivot.ties) {
    write_above(keys, mask, pivot.key);
  } else {
    write_some_ties(keys, mask, pivot, state);
  }
}

// mask.bad_row must hold kNoIndex before.
template <class Rule, class Source, class Launch>
void select_each_row(const Source& source, const Rule& rule, const RowPlan& plan,
                     const RowMask& mask, const Launch& launch) {
  const auto kernel =
      plan.staged ? select_rows<Rule, Source, true> : select_rows<Rule, Source, false>;
  launch(kernel, Shape{grid(plan.rows), plan.threads, plan.shared}, source, rule, plan, mask);
}

}  // namespace liveweight::cuda
