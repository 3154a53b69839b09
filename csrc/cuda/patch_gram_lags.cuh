// Gram matrices of 3x3 patches of stride 1 from products at 13 distances (lags) instead of 45.
//
// u_t u_t+d of all positions is x_q x_q+d summed over the window of q that tap t sees: 45 entries,
// but 13 distances d, and the nine windows differ in two rows and columns at each edge only. So a
// thread adds up the 13 products of its columns and adds them to the entries that see them each
// time it passes a row where the set of windows changes. Nothing is subtracted: the sums keep
// fp32's relative accuracy even where all of a map's mass lies on its border.
#pragma once

#include "launch.cuh"
#include "patch_gram_stage.cuh"

namespace liveweight::cuda::gram {

constexpr int kLags = 13;
constexpr int kEntries = 45;
constexpr int kSeen = kStrip + 4;   // columns of a row that a thread reads
constexpr int kMostRows = 48;       // rows added in one float before they are passed on

// Number of the lag `down` rows and `across` columns on: (0, 0..2), (1, -2..2), (2, -2..2).
__host__ __device__ constexpr int lag_number(int down, int across) {
  return down == 0 ? across : 5 * down + across;
}

// The taps, of the three in one direction, whose window holds padded row or column q of `out`.
struct Taps {
  int first, last;

  __device__ Taps(int q, int out) : first(q - out + 1 > 0 ? q - out + 1 : 0), last(q < 2 ? q : 2) {}
  __device__ bool operator==(const Taps& o) const { return first == o.first && last == o.last; }
  __device__ bool holds(int tap) const { return first <= tap && tap <= last; }
};

// Products of one row's four pixels with its own row and the two below.
__device__ inline void add_lags(const float (&a)[kSeen], const float (&b)[kSeen],
                                const float (&c)[kSeen], float (&sums)[kStrip][kLags]) {
#pragma unroll
  for (int v = 0; v < kStrip; ++v) {
    const float pixel = a[v + 2];
#pragma unroll
    for (int across = -2; across <= 2; ++across) {
      float* const lag = &sums[v][0];
      if (across >= 0) lag[across] = fmaf(pixel, a[v + 2 + across], lag[across]);
      lag[5 + across] = fmaf(pixel, b[v + 2 + across], lag[5 + across]);
      lag[10 + across] = fmaf(pixel, c[v + 2 + across], lag[10 + across]);
    }
  }
}

// Adds one column's lags to every entry whose window holds the column, in rows of `rows`.
__device__ inline void add_windows(const float (&lags)[kLags], Taps rows, Taps columns,
                                   float (&entries)[kEntries]) {
#pragma unroll
  for (int t = 0; t < 9; ++t) {
    if (!rows.holds(t / 3) || !columns.holds(t % 3)) continue;
#pragma unroll
    for (int u = t; u < 9; ++u) {
      entries[packed_index(9, t, u)] += lags[lag_number(u / 3 - t / 3, u % 3 - t % 3)];
    }
  }
}

// Passes the lags of four columns on; neighbours that the same windows hold are added up first.
__device__ inline void pass_on(float (&lags)[kStrip][kLags], int column, int out_columns, Taps rows,
                               float (&entries)[kEntries]) {
#pragma unroll
  for (int v = 0; v < kStrip; ++v) {
    const Taps here(column + v, out_columns);
    const bool alone = v == kStrip - 1 || !(here == Taps(column + v + 1, out_columns));
    if (alone) add_windows(lags[v], rows, here, entries);
#pragma unroll
    for (int d = 0; d < kLags; ++d) {
      if (v < kStrip - 1 && !alone) lags[v + 1 < kStrip ? v + 1 : v][d] += lags[v][d];
      lags[v][d] = 0;
    }
  }
}

// Walks down one strip of columns; three rows are in registers.
template <typename T>
struct Walk {
  const T* const* origin;
  float* pixels;
  const Maps& maps;
  const Patches& p;
  const GramPlan& plan;
  int column;      // of the strip, the block's first
  int staged_row;  // first row in shared memory

  __device__ void stage_rows(int row) {
    __syncthreads();
    staged_row = row;
    stage(pixels, origin, maps, Rectangle{row, column - 2, kStageRows, plan.staged_columns});
    __syncthreads();
  }
  __device__ void load(float (&values)[kSeen], int row) const {
    const int warp = int(threadIdx.x) / kMaps, lane = int(threadIdx.x) % kMaps;
    const float* const from =
        pixels + ((row - staged_row) * plan.staged_columns + warp * kStrip) * kPitch + lane;
#pragma unroll
    for (int i = 0; i < kSeen; ++i) values[i] = from[i * kPitch];
  }
  // The row before which the lags must be passed on: the windows change, or float has enough.
  __device__ int next_stop(int row, int end) const {
    int stop = row + kMostRows < end ? row + kMostRows : end;
    for (int k = 1; k <= 2; ++k) {
      // Windows change at padded rows 1, 2, out and out + 1.
      const int low = k - p.top, high = p.out_rows + k - 1 - p.top;
      if (low > row && low < stop) stop = low;
      if (high > row && high < stop) stop = high;
    }
    return stop;
  }

  __device__ void run(int begin, int end, float (&entries)[kEntries]) {
    const int first_column = column + int(threadIdx.x) / kMaps * kStrip + p.left;
    float lags[kStrip][kLags] = {};
    float a[kSeen], b[kSeen], c[kSeen];
    stage_rows(begin);
    load(a, begin);
    load(b, begin + 1);
    int stop = next_stop(begin, end);
    for (int row = begin; row < end;) {
      if (row + 2 == staged_row + kStageRows) stage_rows(row + 2);
      const int staged_end = staged_row + kStageRows - 2;  // rows whose two lower ones are here
      const int until = stop < staged_end ? stop : staged_end;
      for (; row + 3 <= until; row += 3) {
        load(c, row + 2);
        add_lags(a, b, c, lags);
        load(a, row + 3);
        add_lags(b, c, a, lags);
        load(b, row + 4);
        add_lags(c, a, b, lags);
      }
      for (; row < until; ++row) {
        load(c, row + 2);
        add_lags(a, b, c, lags);
#pragma unroll
        for (int i = 0; i < kSeen; ++i) {
          a[i] = b[i];
          b[i] = c[i];
        }
      }
      if (row == stop) {
        pass_on(lags, first_column, p.out_columns, Taps(row - 1 + p.top, p.out_rows), entries);
        stop = next_stop(row, end);
      }
    }
  }
};

// Grid (groups of maps, parts); out [parts, maps, 45].
template <typename T>
__global__ void __launch_bounds__(kGramWarps* kMaps, 3)
    lag_gram(const T* x, Maps maps, Patches p, GramPlan plan, float* out) {
  LW_DYNAMIC_SHARED(memory);
  __shared__ const T* origin[kMaps];
  float* const pixels = reinterpret_cast<float*>(memory);
  find_maps(origin, x, maps);
  float entries[kEntries] = {};
  const int64_t begin = blockIdx.y * plan.per_part;
  const int64_t end = begin + plan.per_part < plan.units ? begin + plan.per_part : plan.units;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int row = int(unit / plan.across) * plan.tile_rows;
    const int last = row + plan.tile_rows < maps.rows ? row + plan.tile_rows : maps.rows;
    const int column = int(unit % plan.across) * plan.tile_columns;
    Walk<T>{origin, pixels, maps, p, plan, column, 0}.run(row, last, entries);
  }
  write_sums(entries, pixels, maps, kEntries, [](int i) { return i; },
             out + blockIdx.y * maps.count * kEntries);
}

}  // namespace liveweight::cuda::gram
