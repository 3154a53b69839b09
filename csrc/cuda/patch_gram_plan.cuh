// How patch_gram cuts its work into blocks: plain arithmetic, no device code.
#pragma once

#include <algorithm>
#include <cstdint>

namespace liveweight::cuda::gram {

constexpr int kMaps = 32;          // maps of a block: one per lane
constexpr int kPitch = kMaps + 1;  // floats from pixel to pixel in shared memory: no bank conflicts
constexpr int kGramWarps = 4;
constexpr int kStageBytes = 39 << 10;  // four blocks on a multiprocessor of 164 KB
constexpr int kGramBlocks = 4 * 132;
constexpr int kMostTaps = 128;
constexpr int kTriangle = 9;   // taps up to which a thread holds the whole triangle in registers
constexpr int kTapBlock = 8;   // otherwise it holds the products of two blocks of taps
constexpr int kMostAdded = 256;  // products that a thread adds in float before they are passed on

// The maps x[n, c]: strides in elements, so that any layout is read in place.
struct Maps {
  int64_t count, channels;  // count = samples * channels
  int64_t sample_stride, channel_stride, row_stride, column_stride;
  int rows, columns;
};

// The patches that a convolution reads; `top` and `left` of the padding, the rest follows.
struct Patches {
  int kernel_rows, kernel_columns;
  int stride_rows, stride_columns;
  int dilation_rows, dilation_columns;
  int top, left;
  int out_rows, out_columns;

  __host__ __device__ int taps() const { return kernel_rows * kernel_columns; }
  __host__ __device__ int reach_rows() const { return (kernel_rows - 1) * dilation_rows + 1; }
  __host__ __device__ int reach_columns() const {
    return (kernel_columns - 1) * dilation_columns + 1;
  }
};

__host__ __device__ inline int64_t packed_size(int64_t taps) { return taps * (taps + 1) / 2; }

// Place of the pair (t, u), t <= u, in the packed upper triangle.
__host__ __device__ inline int packed_index(int taps, int t, int u) {
  return t * taps - t * (t - 1) / 2 + u - t;
}

// `lags`: a unit is a strip of columns and a piece of the rows; otherwise a tile of positions,
// staged as the pixels it covers or, where that is less, as its patches one by one (`gathered`).
struct GramPlan {
  bool lags, gathered;
  int warps;
  int tile_rows, tile_columns;  // lags: rows of a piece, columns of a strip
  int staged_columns, staged;   // pixels of one row and of the whole stage
  int64_t across, units;        // strips or tiles beside each other; all of them
  int64_t per_part, parts;      // units of one block; blocks of one group of maps
  int64_t groups;               // of 32 maps
  int pairs;                    // pairs of blocks of taps
  int shared;                   // bytes
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// At most `most` units a block, and fewer where that leaves multiprocessors without work.
inline void cut_units(GramPlan& plan, int64_t most) {
  const int64_t wanted = ceil_div(kGramBlocks, plan.groups * plan.pairs);
  plan.per_part = std::max<int64_t>(1, std::min(most, plan.units / wanted));
  plan.per_part = std::max(plan.per_part, ceil_div(plan.units, 65535));
  plan.parts = ceil_div(plan.units, plan.per_part);
}

// 3x3, stride 1, dilation 1.
inline bool has_lags(const Patches& p) {
  return p.kernel_rows == 3 && p.kernel_columns == 3 && p.stride_rows == 1 &&
         p.stride_columns == 1 && p.dilation_rows == 1 && p.dilation_columns == 1;
}

constexpr int kStrip = 4;       // columns of a thread
constexpr int kStageRows = 12;  // rows staged at a time

inline void plan_lags(GramPlan& plan, const Maps& maps) {
  plan.lags = true;
  plan.pairs = 1;
  plan.warps = maps.columns > 2 * kStrip ? 4 : maps.columns > kStrip ? 2 : 1;
  plan.tile_columns = plan.warps * kStrip;
  plan.staged_columns = plan.tile_columns + 4;
  plan.staged = plan.staged_columns * kStageRows;
  plan.across = ceil_div(maps.columns, plan.tile_columns);
  // Pieces of the rows only where there are too few blocks: each reads two rows of the next.
  const int64_t wanted = ceil_div(kGramBlocks, plan.groups * plan.across);
  const int64_t pieces = std::clamp<int64_t>(wanted, 1, ceil_div(maps.rows, 16));
  plan.tile_rows = int(ceil_div(maps.rows, pieces));
  plan.units = plan.across * ceil_div(maps.rows, plan.tile_rows);
  cut_units(plan, plan.units);
}

inline void plan_tiles(GramPlan& plan, const Patches& p) {
  const int taps = p.taps(), room = kStageBytes / (kPitch * int(sizeof(float)));
  plan.warps = kGramWarps;
  const int blocks = taps <= kTriangle ? 1 : int(ceil_div(taps, kTapBlock));
  plan.pairs = blocks * (blocks + 1) / 2;
  // The tile that stages the fewest pixels per position; one position's patch always has room.
  double best = 0;
  for (int wide = 1; wide <= 32; wide *= 2) {
    const int columns = std::min(wide, p.out_columns);
    const int64_t covered = int64_t(columns - 1) * p.stride_columns + p.reach_columns();
    const int64_t fitting = (room / covered - p.reach_rows()) / p.stride_rows + 1;
    if (room / covered < p.reach_rows()) continue;
    const int rows = int(std::min<int64_t>(fitting, p.out_rows));
    const int64_t pixels = covered * (int64_t(rows - 1) * p.stride_rows + p.reach_rows());
    const double cost = double(pixels) / (double(rows) * columns);
    if (best == 0 || cost < best) {
      best = cost;
      plan.tile_rows = rows;
      plan.tile_columns = columns;
      plan.staged_columns = int(covered);
      plan.staged = int(pixels);
    }
  }
  plan.gathered = best == 0 || best >= taps;
  if (plan.gathered) {
    plan.tile_columns = std::min(p.out_columns, std::max(1, std::min(16, room / taps)));
    plan.tile_rows = std::min(p.out_rows, std::max(1, room / taps / plan.tile_columns));
    plan.staged_columns = taps;
    plan.staged = taps * plan.tile_rows * plan.tile_columns;
  }
  plan.across = ceil_div(p.out_columns, plan.tile_columns);
  plan.units = plan.across * ceil_div(p.out_rows, plan.tile_rows);
  cut_units(plan, std::max(1, kMostAdded * plan.warps / (plan.tile_rows * plan.tile_columns)));
}

inline GramPlan make_gram_plan(const Maps& maps, const Patches& p) {
  GramPlan plan{};
  plan.groups = ceil_div(maps.count, kMaps);
  if (has_lags(p)) {
    plan_lags(plan, maps);
  } else {
    plan_tiles(plan, p);
  }
  // The same memory then holds every warp's sums.
  const int sums = plan.lags || p.taps() <= kTriangle ? 45 : kTapBlock * kTapBlock;
  plan.shared = std::max(plan.staged, plan.warps * sums) * kPitch * int(sizeof(float));
  return plan;
}

}  // namespace liveweight::cuda::gram
