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

namespace liveweight::LW_ISA {

typedef Lanes<kLanes> Row;
constexpr int kMostSamples = 16;
constexpr int64_t kAhead = 16 * 1024;  // bytes from the weights read to those asked for
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

  template <bool kMasked, class T>
  [[gnu::always_inline]] Row load_row(const T* w, int rows) {
    const Row v = kMasked ? Row(load_first(w, rows).v) : Row(load(w).v);
    return kPair ? interleave<kLanes>(v) : v;
  }

  template <bool kMasked, class T>
  [[gnu::always_inline]] void add(int chain, const T* w, int rows, const float* x) {
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
  template <bool kMasked, class T>
  [[gnu::always_inline]] void add_block(const T* w, int64_t stride, int rows, const float* x, int64_t x_stride,
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

template <class T, int kVectors, class Sums>
LW_INLINE void store_rows(const Sums& sums, const Strip& strip, const BlockGroup& group,
                          const BlockOutput& out) {
  constexpr int kSamples = sizeof(sums.sums[0][0]) / sizeof(Row);
  const T* bias = static_cast<const T*>(out.bias);
  T* to = static_cast<T*>(out.y);
  T turned[kSamples][kLanes] = {};
  const int count = group.count < kSamples ? group.count : kSamples;
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const int64_t row = strip.row + v * kLanes;
    const int left = strip.count - v * kLanes;
    const int rows = left < kLanes ? left : kLanes;
    if (rows <= 0) return;
    const Row shift = bias ? Row(load_first(bias + row, rows).v) : Row{};
#pragma GCC unroll 16
    for (int s = 0; s < kSamples; ++s) {
      if (s >= count) break;
      const Vec y = activate(Vec{sums.total(v, s) + shift}, out.activation);
      if (out.batch_last) store(turned[s], y);
      else store_first(to + (group.first + s) * out.N + row, y, rows);
    }
    if (!out.batch_last) continue;
    for (int r = 0; r < rows; ++r) {
      T* column = to + (row + r) * out.M + group.first;
      for (int s = 0; s < count; ++s) column[s] = turned[s][r];
    }
  }
}

// Asks for the weights kAhead further on: all lines of a block, or one where so few samples meet it
// that the memory sets the pace and its own prefetcher needs no more than the page.
template <int kSamples, class T>
LW_INLINE void ask_ahead(const T* block, int lines) {
  const char* at = reinterpret_cast<const char*>(block) + kAhead;
  if (kSamples < 4 && lines > 0) lines = 1;
  for (int line = 0; line < lines; ++line) prefetch(at + line * 64);
}

// One strip of the row of blocks [at, end) with one group of samples; `ask`: lines of a block to fetch.
template <class T, int kSamples, int kVectors, bool kPair, bool kMasked>
void sum_strip(const BlockWeight& w, int64_t at, int64_t end, const Strip& strip, int ask,
               const BlockGroup& group, const BlockOutput& out) {
  typedef RowSums<kSamples, kVectors, kPair> Sums;
  Sums sums;
  const int64_t size = w.size(), x_stride = group.step;
  const int steps = w.bw / Sums::kWidth;
  const int64_t stride = int64_t(w.bh) * Sums::kWidth;
  const T* values = block_values<T>(w) + strip.skip;
  const int ahead = steps >= 8 ? 1 : 8 / steps;  // blocks between fetching samples and using them
  const int lines = kSamples >= 4 ? (steps * int(x_stride) + 15) / 16 : 0;
  int64_t i = at;
  if (steps == 1) {  // the chains are blocks
    for (; i + Sums::kChains <= end; i += Sums::kChains) {
#pragma GCC unroll 8
      for (int chain = 0; chain < Sums::kChains; ++chain) {
        const T* block = values + (i + chain) * size;
        ask_ahead<kSamples>(block, ask);
        sums.template add<kMasked>(chain, block, strip.rows, group.x + w.columns[i + chain] * x_stride);
      }
    }
  }
  for (; i < end; ++i) {
    const T* block = values + i * size;
    ask_ahead<kSamples>(block, ask);
    if (lines > 0 && lines <= 64) {
      const float* next = group.x + w.columns[i + ahead < end ? i + ahead : i] * (steps * x_stride);
      for (int line = 0; line < lines; ++line) prefetch(next + line * 16);
    }
    const float* x = group.x + w.columns[i] * (steps * x_stride);
    sums.template add_block<kMasked>(block, stride, strip.rows, x, x_stride, steps);
  }
  store_rows<T, kVectors>(sums, strip, group, out);
}

}  // namespace liveweight::LW_ISA
