// The sum of block_linear: rows of W in vectors, samples as broadcasts, sums of a whole row of blocks
// in registers.
//
// A step is what one vector of weights holds: one column of the block or, where the block has half
// as many rows as a vector has lanes, two (kPair): then lanes alternate between both columns and meet
// samples as pairs of neighbours. x is packed so that a step reads kSamples * (1 or 2) neighbours.
#pragma once

#include "activation.h"
#include "block_linear.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define LW_PERMUTE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#endif
#endif
#ifndef LW_PERMUTE  // GCC before 12
#define LW_PERMUTE(v, ...) __builtin_shuffle(v, Numbers{__VA_ARGS__})
#endif

namespace liveweight {

// Up to kMostSamples samples of x, packed as [padded K / g][width][g], g = 2 for pairs, else 1.
struct BlockGroup {
  const float* x;
  int64_t step;   // floats from one step of columns to the next
  int64_t first;  // first sample
  int count;      // samples
  int width;      // count rounded up to a size that kernels have; lanes without a sample are 0
};

struct BlockOutput {
  float* y;
  int64_t M, N;
  const float* bias;
  int activation;
  bool batch_last;  // y[n * M + m], else y[m * N + n]
};

constexpr int kMostSamples = 16;

}  // namespace liveweight

namespace liveweight::LW_ISA {

typedef Lanes<kLanes> Row;
typedef int32_t Numbers __attribute__((vector_size(sizeof(Row))));

// Lanes of two columns of half a vector each become a0 b0 a1 b1 ...
template <int N>
LW_INLINE Lanes<N> interleave(const Lanes<N>& v) {
  if constexpr (N == 16) {
    return LW_PERMUTE(v, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
  } else if constexpr (N == 8) {
    return LW_PERMUTE(v, 0, 4, 1, 5, 2, 6, 3, 7);
  } else {
    return LW_PERMUTE(v, 0, 2, 1, 3);
  }
}

template <bool kPair>
LW_INLINE Row broadcast_sample(const float* x) {
  if constexpr (kPair) {
    typedef double Pairs __attribute__((vector_size(sizeof(Row))));
    double pair;
    __builtin_memcpy(&pair, x, sizeof pair);
    return Row(pair - Pairs{});
  } else {
    return x[0] - Row{};
  }
}

// kVectors vectors of rows x kSamples samples; kChains independent sums hide the latency of an FMA.
template <int kSamples, int kVectors, bool kPair>
struct RowSums {
  static constexpr int kTile = kSamples * kVectors;
  static constexpr int kChains = kTile >= 8 ? 1 : 8 / kTile;
  static constexpr int kWidth = kPair ? 2 : 1;  // columns of a step
  Row sums[kChains][kVectors][kSamples] = {};

  template <bool kMasked>
  [[gnu::always_inline]] Row load_row(const float* w, int rows) {
    const Row v = kMasked ? Row(load_first(w, rows).v) : Row(load(w).v);
    return kPair ? interleave<kLanes>(v) : v;
  }

  template <bool kMasked>
  [[gnu::always_inline]] void add(int chain, const float* w, int rows, const float* x) {
    Row weight[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      weight[v] = load_row<kMasked>(w + v * kLanes, rows - v * kLanes);
    }
#pragma GCC unroll 16
    for (int s = 0; s < kSamples; ++s) {
      const Row sample = broadcast_sample<kPair>(x + s * kWidth);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[chain][v][s] += weight[v] * sample;
    }
  }

  // One block: `steps` steps of weights, `stride` floats apart.
  template <bool kMasked>
  [[gnu::always_inline]] void add_block(const float* w, int64_t stride, int rows, const float* x, int64_t x_stride,
                           int steps) {
    int step = 0;
    for (; step + kChains <= steps; step += kChains) {
#pragma GCC unroll 8
      for (int chain = 0; chain < kChains; ++chain) {
        add<kMasked>(chain, w + (step + chain) * stride, rows, x + (step + chain) * x_stride);
      }
    }
    for (; step < steps; ++step) {
      add<kMasked>(0, w + step * stride, rows, x + step * x_stride);
    }
  }

  [[gnu::always_inline]] Row total(int v, int s) const {
    Row sum = sums[0][v][s];
#pragma GCC unroll 8
    for (int chain = 1; chain < kChains; ++chain) sum += sums[chain][v][s];
    if constexpr (kPair) {
      Row folded = {};
      for (int r = 0; r < kLanes / 2; ++r) folded[r] = sum[2 * r] + sum[2 * r + 1];
      return folded;
    }
    return sum;
  }
};

// Which rows of W: `count` of them from `row` on, `skip` rows into their blocks.
struct Strip {
  int64_t row;
  int skip, rows, count;  // rows: of the block, to load; count: of W, to store
};

// Every pass over a row of blocks asks for its part of the blocks of the next row, so that weights
// arrive from memory while sums are computed.
struct Fetch {
  int64_t ahead;  // floats
  int first, end;  // lines of 16 floats
};

template <int kVectors, class Sums>
LW_INLINE void store_rows(const Sums& sums, const Strip& strip, const BlockGroup& group,
                          const BlockOutput& out) {
  float turned[kMostSamples][kLanes];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const int64_t row = strip.row + v * kLanes;
    const int left = strip.count - v * kLanes;
    const int rows = left < kLanes ? left : kLanes;
    if (rows <= 0) return;
    const Row bias = out.bias ? Row(load_first(out.bias + row, rows).v) : Row{};
#pragma GCC unroll 16
    for (int s = 0; s < int(sizeof(sums.sums[0][0]) / sizeof(Row)); ++s) {
      if (s >= group.count) break;
      const Vec y = activate(Vec{sums.total(v, s) + bias}, out.activation);
      if (out.batch_last) store(turned[s], y);
      else store_first(out.y + (group.first + s) * out.N + row, y, rows);
    }
    if (!out.batch_last) continue;
    for (int r = 0; r < rows; ++r) {
      float* to = out.y + (row + r) * out.M + group.first;
      for (int s = 0; s < group.count; ++s) to[s] = turned[s][r];
    }
  }
}

// One strip of the row of blocks [at, end) with one group of samples.
template <int kSamples, int kVectors, bool kPair, bool kMasked>
void sum_strip(const BlockWeight& w, int64_t at, int64_t end, const Strip& strip, const Fetch& fetch,
               const BlockGroup& group, const BlockOutput& out) {
  typedef RowSums<kSamples, kVectors, kPair> Sums;
  Sums sums;
  const int64_t size = w.size(), x_stride = group.step;
  const int steps = w.bw / Sums::kWidth;
  const int64_t stride = int64_t(w.bh) * Sums::kWidth;
  const float* values = w.values + strip.skip;
  const int ahead = steps >= 8 ? 1 : 8 / steps;  // blocks between fetching samples and using them
  const int lines = kSamples >= 4 ? (steps * int(x_stride) + 15) / 16 : 0;
  int64_t i = at;
  if (steps == 1) {  // the chains are blocks
    for (; i + Sums::kChains <= end; i += Sums::kChains) {
#pragma GCC unroll 8
      for (int chain = 0; chain < Sums::kChains; ++chain) {
        const float* block = values + (i + chain) * size;
        for (int line = fetch.first; line < fetch.end; ++line) prefetch(block + fetch.ahead + line * 16);
        sums.template add<kMasked>(chain, block, strip.rows, group.x + w.columns[i + chain] * x_stride);
      }
    }
  }
  for (; i < end; ++i) {
    const float* block = values + i * size;
    for (int line = fetch.first; line < fetch.end; ++line) prefetch(block + fetch.ahead + line * 16);
    if (lines > 0 && lines <= 64) {
      const float* next = group.x + w.columns[i + ahead < end ? i + ahead : i] * (steps * x_stride);
      for (int line = 0; line < lines; ++line) prefetch(next + line * 16);
    }
    const float* x = group.x + w.columns[i] * (steps * x_stride);
    sums.template add_block<kMasked>(block, stride, strip.rows, x, x_stride, steps);
  }
  store_rows<kVectors>(sums, strip, group, out);
}

}  // namespace liveweight::LW_ISA
