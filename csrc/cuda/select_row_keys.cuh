// How a block reads, or computes, and holds the keys of one row of scores.
#pragma once

#include <cmath>
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
  bool aligned;  // every row begins and ends on a 16-byte boundary

  using Raw = Vector16;  // loaded, and nothing yet that would wait for it
  // The scores at column..column + 3; 0 past the end of the row.
  __device__ Raw load(int64_t row, int column) const {
    const float* from = data + row * columns + column;
    Raw raw{};
    if (aligned) {
      if (column < columns) raw = load_streaming(from);
      return raw;
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (column + i < columns) raw.word[i] = float_to_bits(from[i]);
    }
    return raw;
  }
  __device__ static uint32_t bits(const Raw& raw, int i) { return raw.word[i]; }
};

// Four neighbouring elements as they lie in memory.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  uint32_t word[sizeof(T)];

  __device__ void load(const T* from) {
    if constexpr (sizeof(T) == 4) {
      const Vector16 raw = load_streaming(from);
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = raw.word[i];
    } else {
      const Vector8 raw = load_streaming8(from);
      word[0] = raw.word[0];
      word[1] = raw.word[1];
    }
  }
  __device__ void set(int i, T value) {
    if constexpr (sizeof(T) == 4) {
      word[i] = float_to_bits(value);
    } else {
      word[i / 2] |= uint32_t(value.bits) << i % 2 * 16;
    }
  }
  __device__ float get(int i) const {
    if constexpr (sizeof(T) == 4) {
      return bits_to_float(word[i]);
    } else {
      return to_float(T{uint16_t(word[i / 2] >> i % 2 * 16)});
    }
  }
};

// The signal that each connection of a Linear carries, never stored: |weight| * activity per input,
// and |bias| as one more connection, the last column.
template <class T>
struct Signals {
  const T* weight;        // [rows, inputs]
  const float* activity;  // [inputs]
  const T* bias;          // [rows] or null
  int inputs, columns;    // columns: inputs + 1 where there is a bias
  bool aligned;           // four neighbours lie on a boundary of their size, in weight and activity

  struct Raw {
    Four<T> weight;
    Four<float> activity;
  };
  __device__ Raw load(int64_t row, int column) const {
    const T* from = weight + row * inputs + column;
    Raw raw{};
    if (aligned && column < inputs) {
      raw.weight.load(from);
      // Not as the weights are loaded: every row reads it again.
      raw.activity = *reinterpret_cast<const Four<float>*>(activity + column);
      return raw;
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (column + i >= columns) break;
      const bool of_bias = column + i == inputs;
      raw.weight.set(i, of_bias ? bias[row] : from[i]);
      raw.activity.set(i, of_bias ? 1.f : activity[column + i]);
    }
    return raw;
  }
  __device__ static uint32_t bits(const Raw& raw, int i) {
    return float_to_bits(fabsf(raw.weight.get(i)) * raw.activity.get(i));
  }
};

// The keys of this thread, in `held` (kStaged) or read from the source each time.
template <class Rule, class Source, bool kStaged>
struct Keys {
  static constexpr bool kSmall = sizeof(typename Source::Raw) <= sizeof(Vector16);
  static constexpr int kAtOnce = kStaged ? kUnitsAtOnce : kSmall ? 2 : 1;
  const Source& source;
  Vector16* held;  // this thread's, one in every kWarpLanes
  int64_t row;
  int first, units;  // the thread's first column

  __device__ Keys(const Source& from, const RowPlan& plan, int64_t of, void* memory)
      : source(from), row(of), units(plan.units) {
    first = warp_index() * units * kUnitColumns + lane_index() * kColumns;
    held = static_cast<Vector16*>(memory) + first / kColumns;
  }
  // Calls visit(u, keys) for all units; several loads are in flight before the first is used.
  template <class Visit>
  __device__ void read(Visit visit) const {
    const auto take = [&](int u, const typename Source::Raw& raw) {
      const int column = first + u * kUnitColumns;
      Vector16 key;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const bool there = Rule::kMass || column + i < source.columns;  // a mass of 0 is none
        key.word[i] = there ? Rule::key(Source::bits(raw, i)) : 0;
      }
      visit(u, key);
    };
    for (int u = 0; u < units; u += kAtOnce) {
      typename Source::Raw raw[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (u + j < units) raw[j] = source.load(row, first + (u + j) * kUnitColumns);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (u + j < units) take(u + j, raw[j]);
      }
    }
  }
  // Calls visit(key) for all keys, the first time that they are needed.
  template <class Visit>
  __device__ void stage(Visit visit) const {
    read([&](int u, const Vector16& key) {
      if constexpr (kStaged) held[u * kWarpLanes] = key;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) visit(key.word[i]);
    });
  }
  // Calls visit(column, keys) for each of the units, in order, all lanes of a warp together. The
  // loop is unrolled where it takes most of the time, and nowhere else: the whole kernel should
  // stay in the instruction cache.
  template <int kUnroll = 1, class Visit>
  __device__ void each_unit(Visit visit) const {
    if constexpr (!kStaged) {
      read([&](int u, const Vector16& key) { visit(first + u * kUnitColumns, key.word); });
    } else {
#pragma unroll kUnroll
      for (int u = 0; u < units; ++u) {
        const Vector16 key = held[u * kWarpLanes];
        visit(first + u * kUnitColumns, key.word);
      }
    }
  }
  template <int kUnroll = 1, class Visit>
  __device__ void each(Visit visit) const {
    each_unit<kUnroll>([&](int, const uint32_t (&key)[kColumns]) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) visit(key[i]);
    });
  }
};

}  // namespace liveweight::cuda
