// Shared memory of patch_gram: |x| of 32 maps, pixel after pixel, in float.
#pragma once

#include "patch_gram_plan.cuh"
#include "ptx.cuh"

namespace liveweight::cuda::gram {

// Where staged pixel number `e` lies in the map, row after row of a rectangle.
struct Rectangle {
  int top, left, rows, columns;

  __device__ int count() const { return rows * columns; }
  __device__ void find(int e, int& y, int& x) const {
    y = top + e / columns;
    x = left + e % columns;
  }
};

// The same for patches one by one: taps of position 0 of the tile, of position 1, ...
struct PatchByPatch {
  Patches p;
  int first_row, first_column, tile_columns, positions;

  __device__ int count() const { return positions * p.taps(); }
  __device__ void find(int e, int& y, int& x) const {
    const int taps = p.taps(), at = e / taps, tap = e % taps;
    y = (first_row + at / tile_columns) * p.stride_rows - p.top +
        tap / p.kernel_columns * p.dilation_rows;
    x = (first_column + at % tile_columns) * p.stride_columns - p.left +
        tap % p.kernel_columns * p.dilation_columns;
  }
};

// Loads that a thread issues before the first use of any: there are few blocks to hide their
// latency. Lanes over pixels: kOwnPixels of kOwnMaps maps; lanes over maps: kOwnColumns of a row.
constexpr int kOwnMaps = 8, kOwnPixels = 2, kOwnColumns = 10;

__device__ inline bool within(int at, int size) { return unsigned(at) < unsigned(size); }

template <typename T, typename Place>
__device__ void stage_by_pixels(float* tile, const T* const* origin, const Maps& maps,
                                const Place& place) {
  const int lane = int(threadIdx.x) % kMaps, warp = int(threadIdx.x) / kMaps;
  const int warps = int(blockDim.x) / kMaps, count = place.count();
  for (int e = lane; e < count; e += kOwnPixels * kMaps) {
    int pixel[kOwnPixels];  // elements from a map's first, -1: none
#pragma unroll
    for (int i = 0; i < kOwnPixels; ++i) {
      int row, column;
      place.find(e + i * kMaps, row, column);
      const bool inside =
          e + i * kMaps < count && within(row, maps.rows) && within(column, maps.columns);
      pixel[i] = inside ? row * int(maps.row_stride) + column : -1;
    }
    for (int m = warp * kOwnMaps; m < kMaps; m += warps * kOwnMaps) {
      float value[kOwnPixels][kOwnMaps];
#pragma unroll
      for (int k = 0; k < kOwnMaps; ++k) {
#pragma unroll
        for (int i = 0; i < kOwnPixels; ++i) {
          value[i][k] = 0.f;
          if (pixel[i] >= 0) {
            value[i][k] = fabsf(to_float(load_global(origin[m + k] + pixel[i])));
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kOwnPixels; ++i) {
        if (e + i * kMaps >= count) break;
#pragma unroll
        for (int k = 0; k < kOwnMaps; ++k) tile[(e + i * kMaps) * kPitch + m + k] = value[i][k];
      }
    }
  }
}

// Columns c to c + kOwnColumns of a staged row, of which those in [begin, end) are in the map.
// kAll: all are, and need no comparison each.
template <bool kAll, typename T>
__device__ inline void stage_columns(float* to, const T* from, int c, int begin, int end,
                                     int columns, int column_stride) {
  float value[kOwnColumns];
#pragma unroll
  for (int k = 0; k < kOwnColumns; ++k) {
    const bool inside = kAll || (c + k >= begin && c + k < end);
    value[k] = 0.f;
    if (inside) value[k] = fabsf(to_float(load_global(from + (c + k) * column_stride)));
  }
#pragma unroll
  for (int k = 0; k < kOwnColumns; ++k) {
    if (kAll || c + k < columns) to[k * kPitch] = value[k];
  }
}

template <typename T>
__device__ void stage_by_maps(float* tile, const T* const* origin, const Maps& maps,
                              const Rectangle& place) {
  const int lane = int(threadIdx.x) % kMaps, warp = int(threadIdx.x) / kMaps;
  const int column_stride = int(maps.column_stride);
  for (int r = warp; r < place.rows; r += int(blockDim.x) / kMaps) {
    const int row = place.top + r;
    // Columns of the rectangle that lie in the map.
    const int begin = place.left < 0 ? -place.left : 0;
    const int behind = within(row, maps.rows) ? maps.columns - place.left : 0;
    const int end = behind < place.columns ? behind : place.columns;
    const T* const from =
        origin[lane] + (row * maps.row_stride + place.left * maps.column_stride);
    for (int c = 0; c < place.columns; c += kOwnColumns) {
      float* const to = tile + (r * place.columns + c) * kPitch + lane;
      if (c >= begin && c + kOwnColumns <= end) {
        stage_columns<true>(to, from, c, begin, end, place.columns, column_stride);
      } else {
        stage_columns<false>(to, from, c, begin, end, place.columns, column_stride);
      }
    }
  }
}

template <typename T>
__device__ void stage_by_maps(float* tile, const T* const* origin, const Maps& maps,
                              const PatchByPatch& place) {
  const int lane = int(threadIdx.x) % kMaps, warp = int(threadIdx.x) / kMaps;
#pragma unroll 4
  for (int e = warp; e < place.count(); e += int(blockDim.x) / kMaps) {
    int row, column;
    place.find(e, row, column);
    const bool inside = within(row, maps.rows) && within(column, maps.columns);
    float value = 0.f;
    if (inside) {
      const int pixel = row * int(maps.row_stride) + column * int(maps.column_stride);
      value = fabsf(to_float(load_global(origin[lane] + pixel)));
    }
    tile[e * kPitch + lane] = value;
  }
}

// Copies the place's pixels of 32 maps; pixels outside a map are 0. Lanes run over what lies side
// by side in memory: over pixels, or (channels last) over maps.
template <typename T, typename Place>
__device__ void stage(float* tile, const T* const* origin, const Maps& maps, const Place& place) {
  if (maps.column_stride == 1) {
    stage_by_pixels(tile, origin, maps, place);
  } else {
    stage_by_maps(tile, origin, maps, place);
  }
}

// Where each of the block's maps begins; lanes past the last map repeat it.
template <typename T>
__device__ void find_maps(const T** origin, const T* x, const Maps& maps) {
  if (threadIdx.x < kMaps) {
    int64_t map = int64_t(blockIdx.x) * kMaps + threadIdx.x;
    if (map >= maps.count) map = maps.count - 1;
    origin[threadIdx.x] =
        x + map / maps.channels * maps.sample_stride + map % maps.channels * maps.channel_stride;
  }
}

// Adds up the warps' sums [kCount] of each map, in order, and writes them to out [maps, size];
// place(i) says where sum i belongs, -1: nowhere. `shared` may still be read by other warps.
template <int kCount, typename PlaceOf>
__device__ void write_sums(const float (&sums)[kCount], float* shared, const Maps& maps,
                           int64_t size, PlaceOf place, float* out) {
  const int lane = int(threadIdx.x) % kMaps, warp = int(threadIdx.x) / kMaps;
  const int warps = int(blockDim.x) / kMaps;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) shared[(warp * kCount + i) * kPitch + lane] = sums[i];
  __syncthreads();
  const int64_t first = int64_t(blockIdx.x) * kMaps;
  for (int at = int(threadIdx.x); at < kCount * kMaps; at += int(blockDim.x)) {
    const int i = at % kCount, map = at / kCount;
    const int to = place(i);
    if (to < 0 || first + map >= maps.count) continue;
    float total = shared[i * kPitch + map];
    for (int w = 1; w < warps; ++w) total += shared[(w * kCount + i) * kPitch + map];
    out[(first + map) * size + to] = total;
  }
}

}  // namespace liveweight::cuda::gram
