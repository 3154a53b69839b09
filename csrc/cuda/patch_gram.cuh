// Gram matrices of the patches that a convolution reads, per sample and channel:
//
//   gram[n, c, (t, u)] = sum over positions p of |x[n, c, p_t]| |x[n, c, p_u]|,   t <= u
//
// A block takes 32 maps, one per lane, so that sums stay in registers, every branch is uniform and
// lanes never add up anything between them. Warps share the positions; parts of a map go to
// several blocks where there are few maps, through a workspace that is added up in order.
//
// Floor: one read of x, bytes(x) / 4.3 TB/s on an H200. Instructions: 3x3 of stride 1 takes 13 FMA
// a pixel (lags); the compiled loops take 16.7 for the products and 10 for staging in either
// layout, and more where windows change, at a map's edges. 128 lanes pass 4.8 pixels a clock and
// multiprocessor, 1.25e12 a second at 1.98 GHz, a little more than float32 maps come at from
// memory; 16-bit types could come at twice that. Other windows of T taps take T (T + 1) / 2 FMA and
// T loads a position up to 9 taps, 64 FMA and 16 loads per pair of 8 taps. Computed, not measured.
//
// Precision: at most 256 terms, all >= 0, are added in one float before they are passed on.
#pragma once

#include "patch_gram_lags.cuh"
#include "patch_gram_tiles.cuh"

namespace liveweight::cuda::gram {

constexpr int kSumThreads = 256;

// out[i] = the sum over parts of partials [parts, count].
static __global__ void __launch_bounds__(kSumThreads)
    sum_parts(const float* partials, int64_t parts, int64_t count, float* out) {
  const int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= count) return;
  double total = 0;
  for (int64_t part = 0; part < parts; ++part) total += partials[part * count + i];
  out[i] = float(total);
}

template <typename T>
auto choose_kernel(const GramPlan& plan, const Patches& p) {
  if (plan.lags) return lag_gram<T>;
  if (p.taps() == 1) return tile_gram<T, 1, false>;
  return p.taps() <= kTriangle ? tile_gram<T, kTriangle, false> : tile_gram<T, kTapBlock, true>;
}

// partials [parts, maps, packed] is read only where plan.parts > 1; maps.count > 0.
template <typename T>
void patch_gram(const T* x, const Maps& maps, const Patches& p, const GramPlan& plan,
                float* partials, float* out, const Launch& launch) {
  const bool split = plan.parts > 1;
  launch(choose_kernel<T>(plan, p),
         Shape{grid(plan.groups, plan.parts, plan.pairs), plan.warps * kMaps, plan.shared}, x,
         maps, p, plan, split ? partials : out);
  if (!split) return;
  const int64_t count = maps.count * packed_size(p.taps());
  launch(sum_parts, Shape{grid(ceil_div(count, kSumThreads)), kSumThreads}, partials, plan.parts,
         count, out);
}

}  // namespace liveweight::cuda::gram
