// Writing the sums of a tile of outputs to where they lie in y.
#pragma once

#include "four_lanes.h"
#include "unstructured_conv2d.h"
#include "unstructured_conv2d_pairs.h"

namespace liveweight::LW_ISA {

// Where a lane's part of a tile goes, and how much of it is inside.
struct LaneOut {
  int64_t offset, rows, columns;
};

LW_INLINE int64_t inside(int64_t limit, int64_t from, int64_t most) {
  const int64_t room = limit - from;
  return room < 0 ? 0 : room < most ? room : most;
}

// Places of all lanes; returns whether every lane's tile is whole, and rows of it lie at a stretch.
LW_INLINE bool place_lanes(const TileJob& job, const OutTile& tile, int64_t samples, LaneOut* lanes) {
  const LaneGrid& grid = job.pack.grid;
  const PlaneStrides& to = job.out.strides;
  bool whole = to.column == 1;
  int lane = 0;
  for (int64_t s = 0; s < grid.samples; ++s) {
    for (int64_t i = 0; i < grid.rows; ++i) {
      const int64_t row = i * job.pack.out_rows + tile.row;
      for (int64_t j = 0; j < grid.columns; ++j) {
        const int64_t column = j * job.pack.out_columns + tile.column;
        LaneOut& out = lanes[lane++];
        out = {s * to.sample + row * to.row + column * to.column,
               s < samples ? inside(job.out.height, row, tile.rows) : 0,
               inside(job.out.width, column, tile.columns)};
        whole &= out.rows == tile.rows && out.columns == tile.columns;
      }
    }
  }
  return whole;
}

// Lanes hold neighbours of a row.
LW_INLINE void put_neighbours(const TileJob& job, const OutTile& tile, const float* sums, float* y) {
  const PlaneStrides& to = job.out.strides;
  for (int64_t i = 0; i < int64_t(tile.rows) * tile.columns; ++i, sums += kLanes) {
    const int64_t row = job.chained ? 0 : tile.row + i / tile.columns;
    const int64_t column = (tile.column + (job.chained ? i : i % tile.columns)) * kLanes;
    const int64_t count = inside(job.out.width, column, kLanes);
    float* out = y + row * to.row + column * to.column;
    if (to.column == 1) {
      store_first(out, load(sums), int(count));
    } else {
      for (int64_t l = 0; l < count; ++l) out[l * to.column] = sums[l];
    }
  }
}

// Lanes hold samples, which lie side by side in y.
LW_INLINE void put_samples(const TileJob& job, const OutTile& tile, int64_t samples, const float* sums,
                           float* y) {
  const PlaneStrides& to = job.out.strides;
  for (int64_t r = 0; r < tile.rows; ++r) {
    for (int64_t c = 0; c < tile.columns; ++c, sums += kLanes) {
      store_first(y + (tile.row + r) * to.row + (tile.column + c) * to.column, load(sums), int(samples));
    }
  }
}

// Lanes hold pairs of neighbours, and every lane's tile is whole.
LW_INLINE void put_pairs(const TileJob& job, const OutTile& tile, const LaneOut* lanes, const float* sums,
                         float* y) {
  constexpr int kQuarter = kLanes / 4;
  float *low = y + lanes[0].offset, *high = y + lanes[2 * kQuarter].offset;
  float *low_end = y + lanes[kQuarter].offset, *high_end = y + lanes[3 * kQuarter].offset;
  const int64_t step = job.out.strides.row;
  for (int64_t r = 0; r < tile.rows; ++r, sums += 2 * kLanes) {
    Vec a, b;
    join_pairs(load(sums), load(sums + kLanes), a, b);
    store_halves(low + r * step, low_end + r * step, a);
    store_halves(high + r * step, high_end + r * step, b);
  }
}

// Four outputs of a row for each lane at once; whole: no lane's tile sticks out.
LW_INLINE void put_blocks(const TileJob& job, const OutTile& tile, const LaneOut* lanes, bool whole,
                          const float* sums, float* y) {
  const PlaneStrides& to = job.out.strides;
  for (int64_t r = 0; r < tile.rows; ++r, sums += tile.columns * kLanes, y += to.row) {
    Four v;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v.row[i] = i < tile.columns ? load(sums + i * kLanes) : zero();
    transpose_four(v);
    if (whole && tile.columns == 4) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) get_quarter(v, i, y + lanes[i].offset);
      continue;
    }
    float numbers[kLanes * 4];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) get_quarter(v, i, numbers + 4 * i);
    for (int i = 0; i < kLanes; ++i) {
      if (r >= lanes[i].rows) continue;
      float* out = y + lanes[i].offset;
      const int64_t count = lanes[i].columns;
      if (count > 0) out[0] = numbers[4 * i];
      if (count > 1) out[to.column] = numbers[4 * i + 1];
      if (count > 2) out[2 * to.column] = numbers[4 * i + 2];
      if (count > 3) out[3 * to.column] = numbers[4 * i + 3];
    }
  }
}

}  // namespace liveweight::LW_ISA
