// How a block of conv_tile takes its sums to y: bias, ReLU, pool, any layout and element.
#pragma once

#include "kernelwise_conv2d_stage.cuh"

namespace liveweight::cuda::kernelwise {

// Where the sum of an output of the tile lies among one filter's: lane after lane, in quads.
__device__ inline int sum_at(const ConvTile& t, int image, int row, int column) {
  const int lane = t.lane_of(image, row / t.rows, column / kQuad);
  return (row % t.rows * 32 + lane) * kQuad + column % kQuad;
}

// A lane's sums of one filter to shared memory, as sum_at finds them.
template <int R>
__device__ inline void keep_sums(float* filter, const float (&sums)[R][kQuad]) {
  float* to = filter + int(threadIdx.x) % 32 * kQuad;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    Quad quad;
#pragma unroll
    for (int q = 0; q < kQuad; ++q) quad.value[q] = sums[r][q];
    *reinterpret_cast<Quad*>(to + r * 32 * kQuad) = quad;
  }
}

__device__ inline float load_any(const void* from, int64_t at, Element element) {
  if (element == Element::kBf16) return to_float(static_cast<const Bf16*>(from)[at]);
  if (element == Element::kHalf) return to_float(static_cast<const Half*>(from)[at]);
  return static_cast<const float*>(from)[at];
}

__device__ inline void store_any(void* to, int64_t at, float value, Element element) {
  if (element == Element::kBf16) {
    static_cast<Bf16*>(to)[at] = from_float<Bf16>(value);
  } else if (element == Element::kHalf) {
    static_cast<Half*>(to)[at] = from_float<Half>(value);
  } else {
    static_cast<float*>(to)[at] = value;
  }
}

// NaN stays NaN, as in torch.
__device__ inline float rectify(float value, bool relu) {
  return relu ? max_nan(value, 0.f) : value;
}

// Largest sum of the pool x pool window that begins there.
__device__ inline float pool_sums(const ConvTile& t, const float* sums, int image, int row,
                                  int column, int pool) {
  float most = sums[sum_at(t, image, row, column)];
#pragma unroll 1
  for (int i = 0; i < pool; ++i) {
#pragma unroll 1
    for (int j = 0; j < pool; ++j) {
      most = max_nan(most, sums[sum_at(t, image, row + i, column + j)]);
    }
  }
  return most;
}

// Takes the sums of all filters, in shared memory, to y: any layout, element and pool. Threads lie
// side by side along what lies side by side in y.
__device__ inline void write_tile(const Conv& c, const ConvTile& t, const Block& b, Place* places,
                                  const float* sums) {
  const int row = b.row / c.pool, column = b.column / c.pool;
  const int rows = least(t.down * t.rows / c.pool, c.pooled_height() - row);
  const int columns = least(t.across * kQuad / c.pool, c.pooled_width() - column);
  const int count = b.images * rows * columns, filter_sums = t.rows * 32 * kQuad;
  each_place(b.images, rows, columns, c.y_stride[0] == 1, [&](int n, int i, int r, int col) {
    places[n].memory = int(i * c.y_stride[0] + r * c.y_stride[2] + col * c.y_stride[3]);
    places[n].shared = c.pool == 1 ? sum_at(t, i, r, col) : i << 16 | r << 8 | col;
  });
  __syncthreads();
  const int side_by_side = c.y_stride[1] == 1 ? t.filters() : t.warps, me = int(threadIdx.x);
  const int first = c.y_stride[1] == 1 ? me % side_by_side : me / 32;
  const int start = c.y_stride[1] == 1 ? me / side_by_side : me % 32;
  const int step = int(blockDim.x) / side_by_side;
#pragma unroll 1
  for (int f = first; f < b.filters; f += side_by_side) {
    const int filter = b.first_filter + f;
    const float bias = c.bias ? load_any(c.bias, filter, c.element) : 0.f;
    const int64_t at = b.image * c.y_stride[0] + filter * c.y_stride[1] + row * c.y_stride[2] +
                       column * c.y_stride[3];
#pragma unroll 1
    for (int n = start; n < count; n += step) {
      const int from = places[n].shared;
      const float sum = c.pool == 1 ? sums[f * filter_sums + from]
                                    : pool_sums(t, sums + f * filter_sums, from >> 16,
                                                (from >> 8 & 255) * c.pool, (from & 255) * c.pool,
                                                c.pool);
      store_any(c.y, at + places[n].memory, rectify(sum + bias, c.relu), c.element);
    }
  }
}

// A lane's patch of one filter straight to y: contiguous rows of whole quads in float.
template <int R>
__device__ inline void write_patch(const Conv& c, const ConvTile& t, const Block& b, int filter,
                                   const float (&sums)[R][kQuad]) {
  const int lane = int(threadIdx.x) % 32;
  const int image = lane / (t.across * t.down), row = b.row + t.patch_down(lane) * R;
  const int column = b.column + t.patch_across(lane) * kQuad;
  if (image >= b.images || column >= c.out_width) return;
  const float bias = c.bias ? static_cast<const float*>(c.bias)[filter] : 0.f;
  float* out = static_cast<float*>(c.y) + (b.image + image) * c.y_stride[0] +
               filter * c.y_stride[1] + row * c.y_stride[2] + column;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (row + r >= c.out_height) return;
    Quad quad;
#pragma unroll
    for (int q = 0; q < kQuad; ++q) quad.value[q] = rectify(sums[r][q] + bias, c.relu);
    *reinterpret_cast<Quad*>(out + r * c.y_stride[2]) = quad;
  }
}

}  // namespace liveweight::cuda::kernelwise
