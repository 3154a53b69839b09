// Gram matrices of patches of any size, stride and dilation: every position's products, one by one.
#pragma once

#include "launch.cuh"
#include "patch_gram_stage.cuh"

namespace liveweight::cuda::gram {

// The taps whose products a thread adds up: all kTaps of a triangle, or two blocks of kTaps.
template <int kTaps, bool kPairs>
struct Held {
  static constexpr int kCount = kPairs ? kTaps * kTaps : kTaps * (kTaps + 1) / 2;
  int first_left, first_right;  // numbers of the first taps

  // Block z of the grid is pair (a, b), a <= b, of blocks of taps, row after row.
  __device__ explicit Held(int blocks) : first_left(0), first_right(0) {
    if constexpr (kPairs) {
      int pair = int(blockIdx.z), a = 0;
      for (; pair >= blocks - a; ++a) pair -= blocks - a;
      first_left = a * kTaps;
      first_right = (a + pair) * kTaps;
    }
  }
  // Sum number i is that of taps t and u.
  __device__ void find(int i, int& t, int& u) const {
    if constexpr (kPairs) {
      t = first_left + i / kTaps;
      u = first_right + i % kTaps;
    } else {
      for (t = 0; i >= kTaps - t; ++t) i -= kTaps - t;
      u = t + i;
    }
  }
};

template <int kTaps, bool kPairs>
__device__ inline void add_products(const float (&left)[kTaps], const float (&right)[kTaps],
                                    float (&sums)[Held<kTaps, kPairs>::kCount]) {
  int i = 0;
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
#pragma unroll
    for (int u = kPairs ? 0 : t; u < kTaps; ++u, ++i) sums[i] = fmaf(left[t], right[u], sums[i]);
  }
}

// Floats between a position's first staged pixel and tap t; taps past the last repeat it.
__device__ inline int tap_offset(const GramPlan& plan, const Patches& p, int t) {
  if (t >= p.taps()) t = p.taps() - 1;
  if (plan.gathered) return t * kPitch;
  return (t / p.kernel_columns * p.dilation_rows * plan.staged_columns +
          t % p.kernel_columns * p.dilation_columns) * kPitch;
}

template <typename T>
__device__ inline void stage_tile(float* pixels, const T* const* origin, const Maps& maps,
                                  const Patches& p, const GramPlan& plan, int row, int column) {
  if (plan.gathered) {
    stage(pixels, origin, maps,
          PatchByPatch{p, row, column, plan.tile_columns, plan.tile_rows * plan.tile_columns});
  } else {
    stage(pixels, origin, maps,
          Rectangle{row * p.stride_rows - p.top, column * p.stride_columns - p.left,
                    plan.staged / plan.staged_columns, plan.staged_columns});
  }
}

// Grid (groups of maps, parts, pairs); out [parts, maps, packed pairs].
template <typename T, int kTaps, bool kPairs>
__global__ void __launch_bounds__(kGramWarps* kMaps, 4)
    tile_gram(const T* x, Maps maps, Patches p, GramPlan plan, float* out) {
  using Sums = Held<kTaps, kPairs>;
  LW_DYNAMIC_SHARED(memory);
  __shared__ const T* origin[kMaps];
  float* const pixels = reinterpret_cast<float*>(memory);
  find_maps(origin, x, maps);
  const int warp = int(threadIdx.x) / kMaps, lane = int(threadIdx.x) % kMaps;
  const Sums held((p.taps() + kTaps - 1) / kTaps);
  int left[kTaps], right[kTaps];
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    left[t] = tap_offset(plan, p, held.first_left + t);
    right[t] = tap_offset(plan, p, held.first_right + t);
  }
  const int row_step = plan.gathered ? plan.tile_columns * p.taps()
                                     : p.stride_rows * plan.staged_columns;
  const int column_step = plan.gathered ? p.taps() : p.stride_columns;

  float sums[Sums::kCount] = {};
  const int64_t begin = blockIdx.y * plan.per_part;
  const int64_t end = begin + plan.per_part < plan.units ? begin + plan.per_part : plan.units;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int row = int(unit / plan.across) * plan.tile_rows;
    const int column = int(unit % plan.across) * plan.tile_columns;
    __syncthreads();
    stage_tile(pixels, origin, maps, p, plan, row, column);
    __syncthreads();
    const int rows = plan.tile_rows < p.out_rows - row ? plan.tile_rows : p.out_rows - row;
    const int columns =
        plan.tile_columns < p.out_columns - column ? plan.tile_columns : p.out_columns - column;
    const float* patch = pixels + warp * column_step * kPitch + lane;
    for (int r = 0, c = warp;; c += kGramWarps, patch += kGramWarps * column_step * kPitch) {
      for (; c >= columns; c -= columns, ++r) {
        patch += (row_step - columns * column_step) * kPitch;
      }
      if (r >= rows) break;
      float a[kTaps], b[kTaps];
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        a[t] = patch[left[t]];
        b[t] = kPairs ? patch[right[t]] : a[t];
      }
      add_products<kTaps, kPairs>(a, b, sums);
    }
  }

  const int taps = p.taps();
  const auto place = [&](int i) {
    int t, u;
    held.find(i, t, u);
    return t <= u && u < taps ? packed_index(taps, t, u) : -1;
  };
  const int64_t size = packed_size(taps);
  write_sums(sums, pixels, maps, size, place, out + blockIdx.y * maps.count * size);
}

}  // namespace liveweight::cuda::gram
