// Convolution with single 3 x 3 kernels of stride 1 by sums that are shifted once.
//
// Shifting the input by one column for every kernel costs as much as multiplying it. A shift commutes with
// the sum over kernels, so each kernel column gets a sum of its own,
//   sum_j[r, m] = sum over kernels and i of weight[i, j] * x[r + i, m],
// and out[r, c] = sum_0[r, c - 1] + sum_1[r, c] + sum_2[r, c + 1] is put together after the last kernel.
// A vector of an input row is loaded once for nine multiply-adds, and nothing is copied.
#pragma once

#include "kernelwise_conv2d.h"
#include "planes.h"

namespace liveweight::LW_ISA {

// Rows of a tile of one vector and of two: three sums of each beside nine weights. Pictures short enough for one
// tile have a few more, whose weights are read again.
constexpr int kMostRows[3] = {0, kRegisters >= 32 ? 8 : 3, kRegisters >= 32 ? 4 : 2};
constexpr int kUsualRows[3] = {0, kRegisters >= 32 ? 6 : 3, kRegisters >= 32 ? 3 : 2};

LW_INLINE int64_t count_tiles(int64_t rows, int64_t vectors) {
  return rows <= kMostRows[vectors] ? 1 : (rows + kUsualRows[vectors] - 1) / kUsualRows[vectors];
}

struct SumsTile {
  int64_t row, plane;          // floats between rows and between channels
  bool skip_top, skip_bottom;  // whether the first or last input row lies in the padding
  Mask inside;                 // lanes of the last vector that are inside the picture
  // Sides::columns: the input columns left and right of the tile from its first input row on, and the
  // floats between channels.
  const float *before, *after;
  int64_t before_plane, after_plane;
  Mask joined_before, joined_after;  // Sides::parts: lanes whose neighbour is the lane before or after
};

// The kept kernels of a filter, and its group's first channel.
LW_INLINE KernelList kernels_of(const KeptFilters& filters, int64_t o, int64_t& channel) {
  const int32_t first = filters.offsets[o];
  channel = o / filters.group_filters * filters.group_channels;
  return {filters.values + int64_t(first) * 9, filters.channels + first, nullptr, filters.offsets[o + 1] - first, 9};
}

// What lies beside a tile's lanes: nothing but padding, columns of the picture, or it consists of parts of
// several lanes each with nothing beside them.
enum class Sides { nothing, columns, parts };

// What follows the sums, and where they go.
struct SumsEnd {
  float* out;
  int64_t step;  // floats between rows
  int lanes;     // of the last vector, how many are stored
  float bias;
  bool relu;
};

LW_INLINE void end_sums(Vec v, const SumsEnd& end, int lanes, float* out) {
  v = v + broadcast(end.bias);
  if (end.relu) v = relu(v);
  if (lanes == kLanes) store(out, v);
  else store_first(out, v, lanes);
}

// Sums of the column beside a tile, rows in the lanes: kernel column j from `column` on.
LW_INLINE Vec add_side(Vec sum, const float* column, const Vec (&weight)[9], int j) {
  sum = fma(load(column), weight[j], sum);
  sum = fma(load(column + 1), weight[3 + j], sum);
  return fma(load(column + 2), weight[6 + j], sum);
}

// Adds an input row to the three output rows that read it.
template <int kRows, int kVectors>
LW_INLINE void add_row(Vec (&sum)[3][kRows][kVectors], Vec v, const Vec (&weight)[9], int t, int n) {
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    if (t < kRows) sum[j][t][n] = fma(v, weight[j], sum[j][t][n]);
    if (t >= 1 && t <= kRows) sum[j][t - 1][n] = fma(v, weight[3 + j], sum[j][t - 1][n]);
    if (t >= 2) sum[j][t - 2][n] = fma(v, weight[6 + j], sum[j][t - 2][n]);
  }
}

// x points to the first lane's middle tap in the first input row. kWhole: all lanes are inside.
template <int kRows, int kVectors, bool kWhole, Sides kSides>
void sums_tile(const float* x, const KernelList& kernels, const SumsTile& tile, const SumsEnd& end) {
  Vec sum[3][kRows][kVectors], before = zero(), after = zero();
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) sum[j][r][n] = zero();
    }
  }
  for (int32_t i = 0; i < kernels.count; ++i) {
    const float* p = x + kernels.sources[i] * tile.plane;
    Vec weight[9];
#pragma GCC unroll 9
    for (int j = 0; j < 9; ++j) weight[j] = broadcast(kernels.values[i * 9 + j]);
#pragma GCC unroll 10
    for (int t = 0; t < kRows + 2; ++t) {
      if ((t == 0 && tile.skip_top) || (t == kRows + 1 && tile.skip_bottom)) continue;
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) {
        const float* row = p + t * tile.row + n * kLanes;
        add_row(sum, kWhole || n + 1 < kVectors ? load(row) : load(row, tile.inside), weight, t, n);
      }
    }
    if (kSides == Sides::columns) {
      before = add_side(before, tile.before + kernels.sources[i] * tile.before_plane, weight, 0);
      after = add_side(after, tile.after + kernels.sources[i] * tile.after_plane, weight, 2);
    }
  }
  float beside[2][kLanes > kRows ? kLanes : kRows];
  if (kSides == Sides::columns) store(beside[0], before), store(beside[1], after);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) {
      const bool first = n == 0, last = n + 1 == kVectors, columns = kSides == Sides::columns;
      Vec l = first ? (columns ? broadcast(beside[0][r]) : zero()) : sum[0][r][n - (n > 0)];
      Vec m = last ? (columns ? broadcast(beside[1][r]) : zero()) : sum[2][r][n + (n + 1 < kVectors)];
      l = with_previous(sum[0][r][n], l);
      m = with_next(sum[2][r][n], m);
      if (kSides == Sides::parts) l = select(tile.joined_before, l, zero()), m = select(tile.joined_after, m, zero());
      end_sums(sum[1][r][n] + (l + m), end, last ? end.lanes : kLanes, end.out + r * end.step + n * kLanes);
    }
  }
}

using SumsRun = void (*)(const float*, const KernelList&, const SumsTile&, const SumsEnd&);

template <int kVectors, bool kWhole, Sides kSides>
struct SumsTable {
  SumsRun run[kMostRows[kVectors] + 1];
  template <int kRows>
  constexpr void fill() {
    if constexpr (kRows > 0) {
      run[kRows] = &sums_tile<kRows, kVectors, kWhole, kSides>;
      fill<kRows - 1>();
    }
  }
  constexpr SumsTable() : run() { fill<kMostRows[kVectors]>(); }
};

LW_INLINE SumsRun find_sums_tile(int64_t rows, int64_t vectors, bool whole, bool columns) {
  static constexpr SumsTable<1, true, Sides::nothing> one;
  static constexpr SumsTable<1, true, Sides::columns> one_beside;
  static constexpr SumsTable<1, false, Sides::nothing> part;
  static constexpr SumsTable<1, false, Sides::columns> part_beside;
  static constexpr SumsTable<2, true, Sides::nothing> two;
  static constexpr SumsTable<2, true, Sides::columns> two_beside;
  static constexpr SumsTable<2, false, Sides::nothing> two_part;
  static constexpr SumsTable<2, false, Sides::columns> two_part_beside;
  if (vectors == 1 && whole) return columns ? one_beside.run[rows] : one.run[rows];
  if (vectors == 1) return columns ? part_beside.run[rows] : part.run[rows];
  if (whole) return columns ? two_beside.run[rows] : two.run[rows];
  return columns ? two_part_beside.run[rows] : two_part.run[rows];
}

LW_INLINE SumsRun find_parts_tile(int64_t rows) {
  static constexpr SumsTable<1, true, Sides::parts> table;
  return table.run[rows];
}

// Planes of one vector each, rows of `width` lanes below each other: all nine taps are sums that are shifted
// at the end. The planes of kSamples samples lie side by side; end[s] says where each one's sums go.
template <int kSamples>
void sums_plane(const float* x, const KernelList& kernels, const SumsTile& tile, int width, const SumsEnd& end,
                int64_t sample_step) {
  Vec sum[kSamples][9];
#pragma GCC unroll 3
  for (int s = 0; s < kSamples; ++s) {
#pragma GCC unroll 9
    for (int j = 0; j < 9; ++j) sum[s][j] = zero();
  }
  for (int32_t i = 0; i < kernels.count; ++i) {
    const float* p = x + kernels.sources[i] * (kSamples * kLanes);
    Vec v[kSamples];
#pragma GCC unroll 3
    for (int s = 0; s < kSamples; ++s) v[s] = load(p + s * kLanes);
#pragma GCC unroll 9
    for (int j = 0; j < 9; ++j) {
      const Vec weight = broadcast(kernels.values[i * 9 + j]);
#pragma GCC unroll 3
      for (int s = 0; s < kSamples; ++s) sum[s][j] = fma(v[s], weight, sum[s][j]);
    }
  }
#pragma GCC unroll 3
  for (int s = 0; s < kSamples; ++s) {
    Vec row[3];
#pragma GCC unroll 3
    for (int a = 0; a < 3; ++a) {
      const Vec l = select(tile.joined_before, with_previous(sum[s][3 * a], zero()), zero());
      const Vec r = select(tile.joined_after, with_next(sum[s][3 * a + 2], zero()), zero());
      row[a] = sum[s][3 * a + 1] + (l + r);
    }
    for (int l = 0; l < width; ++l) {
      row[0] = with_previous(row[0], zero());
      row[2] = with_next(row[2], zero());
    }
    end_sums(row[1] + (row[0] + row[2]), end, end.lanes, end.out + s * sample_step);
  }
}

}  // namespace liveweight::LW_ISA
