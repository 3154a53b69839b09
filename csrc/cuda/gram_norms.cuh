// Norms of responses from Gram matrices, added up over samples:
//
//   sums[o, i] += sum over n of sqrt(|k_oi|^T gram[n, c] |k_oi|),   c the channel that (o, i) reads
//
// The quadratic form is taken directly: with gram's packed triangle of E = T (T + 1) / 2 numbers
// and the E products of a kernel's taps it is one product of matrices per channel, [samples, E]
// by [E, filters]. A factorisation of gram first would cost as much again and fail where gram has
// no full rank (maps of fewer positions than taps); here nothing is subtracted, nothing divided.
//
// Floor: arithmetic, samples * channels * filters of a group * E FMA at 128 a clock and
// multiprocessor: 45 us at 1.98 GHz on an H200, 128 samples and 512 x 512 kernels of 3x3, computed
// and not measured. A convolution takes 9 FMA per output pixel instead of 45 per map. The main loop
// has 146 instructions for 128 FMA: three 16-byte loads from shared memory feed 32. One square root
// per 45 FMA is 1/6 of what the multi-function units can do.
//
// Precision: the forms are fp32 sums of terms >= 0, of 48 at a time and then of those sums; at most
// 4 norms are added in float.
#pragma once

#include <cstdint>

#include "launch.cuh"
#include "ptx.cuh"

namespace liveweight::cuda::gram {

constexpr int kNormThreads = 128;
constexpr int kTileFilters = 64;
constexpr int kTileSamples = 64;
constexpr int kTileEntries = 48;   // of the packed triangle; one step does all of 3x3
constexpr int kRow = 64 + 4;       // floats: 16-byte loads, and stores without bank conflicts
constexpr int kOwnFilters = 8, kOwnSamples = 4;  // of one thread
constexpr int kNormBlocks = 4 * 132;

struct NormShape {
  int64_t samples, channels, filters;  // filters: of one group
  int64_t per_group;                   // channels of one group
  int taps;
  int64_t entries;
};

struct NormPlan {
  int64_t tiles;               // of filters
  int64_t per_part, parts;     // samples of one block; blocks along the samples
  int shared;                  // bytes
};

inline NormPlan make_norm_plan(const NormShape& s) {
  NormPlan plan{};
  plan.tiles = (s.filters + kTileFilters - 1) / kTileFilters;
  const int64_t steps = (s.samples + kTileSamples - 1) / kTileSamples;
  int64_t parts = kNormBlocks / (s.channels * plan.tiles);
  if (parts > steps) parts = steps;
  if (parts < 1) parts = 1;
  const int64_t steps_per_part = (steps + parts - 1) / parts;
  plan.per_part = steps_per_part * kTileSamples;
  plan.parts = (steps + steps_per_part - 1) / steps_per_part;
  plan.shared = (2 * kTileEntries * kRow + s.taps * kTileFilters) * int(sizeof(float));
  return plan;
}

struct alignas(16) Four {
  float v[4];
};

// The taps of an entry, as offsets into the block's kernels, and what their product counts.
struct Pair {
  int16_t left, right;
  float times;  // 2 off the diagonal, 0 past the last entry
};

__device__ inline void find_pairs(int64_t first, const NormShape& s, Pair* pairs) {
  for (int k = int(threadIdx.x); k < kTileEntries; k += kNormThreads) {
    int64_t entry = first + k;
    int t = 0;
    for (; t < s.taps && entry >= s.taps - t; ++t) entry -= s.taps - t;
    const bool none = t == s.taps;
    pairs[k] = none ? Pair{0, 0, 0.f}
                    : Pair{int16_t(t * kTileFilters), int16_t((t + int(entry)) * kTileFilters),
                           entry ? 2.f : 1.f};
  }
}

// Products of taps, [entries, filters].
__device__ inline void fill_products(const float* kernels, const Pair* pairs,
                                     float (*products)[kRow]) {
  const int filter = int(threadIdx.x) % kTileFilters;
#pragma unroll 4
  for (int k = int(threadIdx.x) / kTileFilters; k < kTileEntries;
       k += kNormThreads / kTileFilters) {
    const Pair pair = pairs[k];
    // 0 * infinity is NaN: a weight that is not finite must not reach entries that are not there.
    const float product = kernels[pair.left + filter] * kernels[pair.right + filter];
    products[k][filter] = pair.times == 0 ? 0.f : pair.times * product;
  }
}

// Gram matrices, [entries, samples], of samples up to `end`; 0 past the last of either.
__device__ inline void fill_gram(const float* gram, int64_t first, int64_t sample, int64_t end,
                                 const NormShape& s, float (*tile)[kRow]) {
  constexpr int kBeside = kNormThreads / kTileEntries;  // fours of samples
  const int k = int(threadIdx.x) % kTileEntries, beside = int(threadIdx.x) / kTileEntries;
  if (beside >= kBeside) return;
  const int64_t step = s.channels * s.entries;
  const int there = end - sample < kTileSamples ? int(end - sample) : kTileSamples;
  const int mine = first + k < s.entries ? there : 0;
  const float* from = gram + (sample + 4 * beside) * step + first + k;
#pragma unroll 2
  for (int n = 4 * beside; n < kTileSamples; n += 4 * kBeside, from += 4 * kBeside * step) {
    Four values;
#pragma unroll
    for (int i = 0; i < 4; ++i) values.v[i] = n + i < mine ? from[i * step] : 0.f;
    *reinterpret_cast<Four*>(&tile[k][n]) = values;
  }
}

__device__ inline void add_step(const float (*products)[kRow], const float (*tile)[kRow],
                                int filter, int sample,
                                float (&forms)[kOwnFilters][kOwnSamples]) {
#pragma unroll 4
  for (int k = 0; k < kTileEntries; ++k) {
    Four a[2];
    a[0] = *reinterpret_cast<const Four*>(&products[k][filter]);
    a[1] = *reinterpret_cast<const Four*>(&products[k][filter + kTileFilters / 2]);
    const Four b = *reinterpret_cast<const Four*>(&tile[k][sample]);
#pragma unroll
    for (int o = 0; o < kOwnFilters; ++o) {
#pragma unroll
      for (int n = 0; n < kOwnSamples; ++n) {
        forms[o][n] = fmaf(a[o / 4].v[o % 4], b.v[n], forms[o][n]);
      }
    }
  }
}

// Grid (channels * tiles of filters, parts). `out` [parts, filters of all groups, per_group]; with
// `add` (one part) the sums are added to what it holds. kSteps: the triangle takes several steps.
template <bool kSteps>
__global__ void __launch_bounds__(kNormThreads, kSteps ? 3 : 4)
    sum_norms(const float* gram, const float* weight, NormShape s, NormPlan plan, bool add,
              double* out) {
  LW_DYNAMIC_SHARED(memory);
  __shared__ Pair pairs[kTileEntries];
  auto* const products = reinterpret_cast<float(*)[kRow]>(memory);
  float(*const tile)[kRow] = products + kTileEntries;
  float* const kernels = tile[kTileEntries];  // [taps, filters]
  const int64_t channel = blockIdx.x / plan.tiles;
  const int64_t first_filter = blockIdx.x % plan.tiles * kTileFilters;
  // Row of weight [filters of all groups, per_group] and of out that filter 0 of the tile has.
  const int64_t row = channel / s.per_group * s.filters + first_filter;
  const int64_t input = channel % s.per_group;

  for (int at = int(threadIdx.x); at < s.taps * kTileFilters; at += kNormThreads) {
    const int t = at % s.taps, o = at / s.taps;
    const bool inside = first_filter + o < s.filters;
    kernels[t * kTileFilters + o] =
        inside ? fabsf(weight[((row + o) * s.per_group + input) * s.taps + t]) : 0.f;
  }

  const int filter = int(threadIdx.x) % 8 * 4, sample = int(threadIdx.x) / 8 * kOwnSamples;
  const int64_t begin = blockIdx.y * plan.per_part;
  const int64_t end = begin + plan.per_part < s.samples ? begin + plan.per_part : s.samples;
  double totals[kOwnFilters] = {};
  for (int64_t n = begin; n < end; n += kTileSamples) {
    float forms[kOwnFilters][kOwnSamples] = {};
    for (int64_t first = 0; first < s.entries; first += kTileEntries) {
      // The products of a single step stay for all samples.
      const bool fill = n == begin || kSteps;
      __syncthreads();
      if (fill) find_pairs(first, s, pairs);
      fill_gram(gram + channel * s.entries, first, n, end, s, tile);
      __syncthreads();
      if (fill) {
        fill_products(kernels, pairs, products);
        __syncthreads();
      }
      // A warp has 16 samples: where there are fewer the others do nothing.
      if (n + sample / 16 * 16 >= end) continue;
      if constexpr (kSteps) {
        float step[kOwnFilters][kOwnSamples] = {};
        add_step(products, tile, filter, sample, step);
#pragma unroll
        for (int i = 0; i < kOwnFilters * kOwnSamples; ++i) {
          forms[i / kOwnSamples][i % kOwnSamples] += step[i / kOwnSamples][i % kOwnSamples];
        }
      } else {
        add_step(products, tile, filter, sample, forms);
      }
    }
#pragma unroll
    for (int o = 0; o < kOwnFilters; ++o) {
      float norms = 0;
#pragma unroll
      for (int i = 0; i < kOwnSamples; ++i) norms += square_root(forms[o][i]);
      totals[o] += norms;
    }
  }

  // The threads of one filter, in order; `tile` is free and has room for [threads, filters].
  static_assert(2 * kTileFilters * (kTileSamples / kOwnSamples) <= kTileEntries * kRow);
  double* const shared = reinterpret_cast<double*>(tile);
  __syncthreads();
#pragma unroll
  for (int o = 0; o < kOwnFilters; ++o) {
    shared[sample / kOwnSamples * kTileFilters + filter + o % 4 + o / 4 * (kTileFilters / 2)] =
        totals[o];
  }
  __syncthreads();
  const int o = int(threadIdx.x);
  if (o >= kTileFilters || first_filter + o >= s.filters) return;
  double total = 0;
  for (int i = 0; i < kTileSamples / kOwnSamples; ++i) total += shared[i * kTileFilters + o];
  const int64_t groups = s.channels / s.per_group;
  double* const to =
      out + (blockIdx.y * groups * s.filters + row + o) * s.per_group + input;
  *to = add ? *to + total : total;
}

constexpr int kAddThreads = 256;

// sums[i] += the sum over parts of partials [parts, count], in order.
static __global__ void __launch_bounds__(kAddThreads)
    add_norms(const double* partials, int64_t parts, int64_t count, double* sums) {
  const int64_t i = int64_t(blockIdx.x) * kAddThreads + threadIdx.x;
  if (i >= count) return;
  double total = 0;
  for (int64_t part = 0; part < parts; ++part) total += partials[part * count + i];
  sums[i] += total;
}

// partials [parts, filters of all groups, per_group] is used only where plan.parts > 1.
inline void gram_norms(const float* gram, const float* weight, const NormShape& s,
                       const NormPlan& plan, double* partials, double* sums,
                       const Launch& launch) {
  const bool split = plan.parts > 1;
  const Shape shape{grid(s.channels * plan.tiles, plan.parts), kNormThreads, plan.shared};
  launch(s.entries > kTileEntries ? sum_norms<true> : sum_norms<false>, shape, gram, weight, s,
         plan, !split, split ? partials : sums);
  if (!split) return;
  const int64_t count = s.channels * s.filters;
  launch(add_norms, Shape{grid((count + kAddThreads - 1) / kAddThreads), kAddThreads}, partials,
         plan.parts, count, sums);
}

}  // namespace liveweight::cuda::gram
