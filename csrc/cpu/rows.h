// Convolution with single 3 x 3 kernels of stride 1, straight from unpadded planes.
//
// A tile of output rows, one vector wide, is held in registers beside the nine weights of a kernel. Each
// input row is loaded once and serves three output rows. The vectors one column to either side are put
// together in registers: loads across two cache lines cost more, and masked loads take a multiply-add's
// slot. Columns and rows beyond the picture are left out, so nothing is copied or multiplied by padding.
#pragma once

#include "planes.h"

namespace liveweight {

// One sample [channels, height, width] and where its output lies in it: output (r, c) and tap (i, j)
// read x[r + i - padding[0], c + j - padding[1]]. Padding is 0 or 1.
struct RowsShape {
  int64_t height, width, padding[2];
};

}  // namespace liveweight

namespace liveweight::LW_ISA {

constexpr int kTallest = kRegisters >= 32 ? 16 : 8;  // rows of a tile

struct RowsTile {
  int64_t width, plane;        // floats between rows and between channels
  bool skip_top, skip_bottom;  // whether the first or last input row lies in the padding
  bool left, right;            // whether the picture goes on to the side of the vector
  Mask inside;                 // lanes of the vector that are inside the picture
};

// Row t of the input, read through kernel column j, is added to up to three output rows.
template <int kRows>
LW_INLINE void add_row(Vec (&acc)[kRows], Vec row, const Vec (&weight)[9], int t, int j) {
  if (t < kRows) acc[t] = fma(row, weight[j], acc[t]);
  if (t >= 1 && t <= kRows) acc[t - 1] = fma(row, weight[3 + j], acc[t - 1]);
  if (t >= 2) acc[t - 2] = fma(row, weight[6 + j], acc[t - 2]);
}

// x points to the input column of the first lane's middle tap, in the first input row. kWhole: all
// lanes are inside the picture.
template <int kRows, bool kWhole>
void rows_tile(const float* x, const KernelList& kernels, const RowsTile& tile, float* out,
               int64_t out_step) {
  const float nothing = 0.0f;
  const int64_t before_step = tile.left ? tile.width : 0, after_step = tile.right ? tile.width : 0;
  Vec acc[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) acc[r] = zero();
  for (int32_t i = 0; i < kernels.count; ++i) {
    const float* p = x + kernels.sources[i] * tile.plane;
    const float* before = tile.left ? p - 1 : &nothing;
    const float* after = tile.right ? p + kLanes : &nothing;
    Vec weight[9];
#pragma GCC unroll 9
    for (int j = 0; j < 9; ++j) weight[j] = broadcast(kernels.values[i * 9 + j]);
#pragma GCC unroll 18
    for (int t = 0; t < kRows + 2; ++t) {
      if ((t == 0 && tile.skip_top) || (t == kRows + 1 && tile.skip_bottom)) continue;
      const float* row = p + t * tile.width;
      const Vec middle = kWhole ? load(row) : load(row, tile.inside);
      add_row(acc, middle, weight, t, 1);
      add_row(acc, with_previous(middle, broadcast(before[t * before_step])), weight, t, 0);
      add_row(acc, with_next(middle, broadcast(after[t * after_step])), weight, t, 2);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) store(out + r * out_step, acc[r]);
}

template <bool kWhole>
struct RowsTable {
  using Run = void (*)(const float*, const KernelList&, const RowsTile&, float*, int64_t);
  Run run[kTallest + 1];
  template <int kRows>
  constexpr void fill() {
    if constexpr (kRows > 0) {
      run[kRows] = &rows_tile<kRows, kWhole>;
      fill<kRows - 1>();
    }
  }
  constexpr RowsTable() : run() { fill<kTallest>(); }
};

// Output rows [from, from + rows) into out, whole vectors, also past the last column.
LW_INLINE void convolve_rows(const float* x, const KernelList& kernels, const RowsShape& shape,
                             int64_t from, int64_t rows, int64_t columns, float* out, int64_t out_step) {
  static constexpr RowsTable<true> whole;
  static constexpr RowsTable<false> partial;
  RowsTile tile;
  tile.width = shape.width;
  tile.plane = shape.height * shape.width;
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int64_t middle = c - shape.padding[1] + 1;
    const int64_t left = shape.width - middle;
    tile.inside = first(int(clamp(left, 0, kLanes)));
    tile.left = middle > 0;
    tile.right = left > kLanes;
    // Equal tiles: rows short of a whole tile cost more each.
    for (int64_t tiles = (rows + kTallest - 1) / kTallest, done = 0; tiles > 0; --tiles) {
      const int64_t count = (rows - done + tiles - 1) / tiles;
      const int64_t top = from + done - shape.padding[0];
      tile.skip_top = top < 0;
      tile.skip_bottom = top + count + 1 >= shape.height;
      const auto run = left >= kLanes ? whole.run[count] : partial.run[count];
      run(x + middle + top * shape.width, kernels, tile, out + done * out_step + c, out_step);
      done += count;
    }
  }
}

}  // namespace liveweight::LW_ISA
