// How a block reads and holds the keys of one row of scores.
#pragma once

#include <cstdint>

#include "select_block.cuh"

namespace liveweight::cuda {

constexpr int kColumns = 4;                            // neighbours that one thread handles
constexpr int kUnitColumns = kWarpLanes * kColumns;    // neighbours that a warp handles
constexpr int kUnitsAtOnce = 4;                        // loads in flight per thread
constexpr int kMostBuckets = 2048;

// How a row is laid over a block: each warp has `units` successive units.
struct RowPlan {
  int64_t rows;
  int columns, units, threads, buckets;
  bool staged;  // the keys fit shared memory
  int shared;   // bytes
};

// `limit`: bytes of shared memory that a block may have. It decides how fast a row is read, never
// what is kept.
template <class Rule>
RowPlan plan_rows(int64_t rows, int64_t columns, int limit) {
  RowPlan plan{rows, int(columns), 0, 0, 256, false, 0};
  // 256 buckets or more have at most 2^23 keys each: one exponent.
  while (plan.buckets < kMostBuckets && plan.buckets * 8 < columns) plan.buckets *= 2;
  const int64_t units = (columns + kUnitColumns - 1) / kUnitColumns;
  const int64_t warps = columns > 32768 ? 32 : columns > 4096 ? 16 : (units + 3) / 4;
  plan.units = int((units + warps - 1) / warps);
  plan.threads = kWarpLanes * int((units + plan.units - 1) / plan.units);
  plan.shared = plan.buckets * int(sizeof(uint32_t)) * (Rule::kMass ? 3 : 1);
  const int64_t keys = int64_t(plan.threads) * plan.units * kColumns * int(sizeof(uint32_t));
  plan.staged = plan.shared + keys <= limit - int(sizeof(BlockState));
  if (plan.staged) plan.shared += int(keys);
  return plan;
}

// Plain scores [rows, columns].
struct StoredScores {
  const float* data;
  int columns;
  bool aligned;  // every row begins on a 16-byte boundary

  template <class Rule>
  __device__ void keys(int64_t row, int column, uint32_t (&key)[kColumns]) const {
    const float* from = data + row * columns + column;
    if (aligned && column + kColumns <= columns) {
      const Vector16 loaded = load_streaming(from);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) key[i] = Rule::key(bits_to_float(loaded.word[i]));
      return;
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) key[i] = column + i < columns ? Rule::key(from[i]) : 0;
  }
};

// The keys of this thread, in `held` (kStaged) or read from the source each time.
template <class Rule, class Source, bool kStaged>
struct Keys {
  const Source& source;
  Vector16* held;  // this thread's, one in every kWarpLanes
  int64_t row;
  int first, units;  // the thread's first column

  __device__ Keys(const Source& from, const RowPlan& plan, int64_t of, void* memory)
      : source(from), row(of), units(plan.units) {
    first = warp_index() * units * kUnitColumns + lane_index() * kColumns;
    held = static_cast<Vector16*>(memory) + first / kColumns;
  }
  __device__ Vector16 read(int u) const {
    Vector16 key;
    source.template keys<Rule>(row, first + u * kUnitColumns, key.word);
    return key;
  }
  // Calls visit(key) for all keys, the first time that they are needed.
  template <class Visit>
  __device__ void stage(Visit visit) const {
    if constexpr (!kStaged) return each(visit);
    const auto keep = [&](int u, const Vector16& key) {
      held[u * kWarpLanes] = key;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) visit(key.word[i]);
    };
    int u = 0;
    for (; u + kUnitsAtOnce <= units; u += kUnitsAtOnce) {
      Vector16 key[kUnitsAtOnce];
#pragma unroll
      for (int j = 0; j < kUnitsAtOnce; ++j) key[j] = read(u + j);
#pragma unroll
      for (int j = 0; j < kUnitsAtOnce; ++j) keep(u + j, key[j]);
    }
    for (; u < units; ++u) keep(u, read(u));
  }
  // Calls visit(column, keys) for each of the units, in order, all lanes of a warp together.
  template <class Visit>
  __device__ void each_unit(Visit visit) const {
#pragma unroll kUnitsAtOnce
    for (int u = 0; u < units; ++u) {
      const Vector16 key = kStaged ? held[u * kWarpLanes] : read(u);
      visit(first + u * kUnitColumns, key.word);
    }
  }
  template <class Visit>
  __device__ void each(Visit visit) const {
    each_unit([&](int, const uint32_t (&key)[kColumns]) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) visit(key[i]);
    });
  }
};

}  // namespace liveweight::cuda
