// The inner loops of unstructured_conv2d: one tile of outputs of one block of filters, over all tiles
// of the weight, then bias and ReLU while the sums are in cache.
#include "unstructured_conv2d.h"

namespace liveweight::LW_ISA {

// Entries of a segment into kRows x kColumns vectors of sums. Few sums: entries take turns with
// several sets of them, which hides the latency of a multiply-add.
template <class Index, int kRows, int kColumns>
LW_INLINE void add_segment(const float* x, int64_t row_step, const float* values, const Index* columns,
                           int64_t count, const int64_t* table, float* sums) {
  constexpr int kSums = kRows * kColumns;
  constexpr int kChains = kSums <= 2 ? 4 : kSums <= 4 ? 2 : 1;
  Vec acc[kChains][kSums];
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) {
    acc[0][i] = load(sums + i * kLanes);
#pragma GCC unroll 4
    for (int chain = 1; chain < kChains; ++chain) acc[chain][i] = zero();
  }
  int64_t k = 0;
  for (; k + kChains <= count; k += kChains) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      const float* p = x + table[columns[k + chain]];
      const Vec weight = broadcast(values[k + chain]);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
          Vec& sum = acc[chain][r * kColumns + c];
          sum = fma(weight, load(p + r * row_step + c * kLanes), sum);
        }
      }
    }
  }
  for (; kChains > 1 && k < count; ++k) {
    const float* p = x + table[columns[k]];
    const Vec weight = broadcast(values[k]);
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) {
      acc[0][i] = fma(weight, load(p + i / kColumns * row_step + i % kColumns * kLanes), acc[0][i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) {
#pragma GCC unroll 4
    for (int chain = 1; chain < kChains; ++chain) acc[0][i] += acc[chain][i];
    store(sums + i * kLanes, acc[0][i]);
  }
}

// All segments of a group. However wrong the index is, no memory outside is touched: counts are
// bounded here, and the table, sums and shifts have room for any row and column.
template <class Index, int kRows, int kColumns>
void add_group(const float* x, const TileJob& job, int64_t block, int64_t group, float* sums) {
  const int32_t *from = job.weight.offsets + 2 * group, *to = from + 2;
  const float* values = job.weight.values + from[0];
  const Index* columns = static_cast<const Index*>(job.weight.columns) + from[0];
  const Index* segment = static_cast<const Index*>(job.weight.segments) + 2 * int64_t(from[1]);
  const Index* end = static_cast<const Index*>(job.weight.segments) + 2 * int64_t(to[1]);
  int64_t left = to[0] - from[0];
  for (; segment < end; segment += 2) {
    int64_t count = int64_t(segment[1]) + 1;
    if (count > left) count = left;
    const int64_t row = segment[0];
    const float* source = job.shift ? x + job.shift[block * job.weight.rows + row] : x;
    add_segment<Index, kRows, kColumns>(source, job.row_step, values, columns, count, job.table,
                                        sums + row * (kRows * kColumns * kLanes));
    values += count, columns += count, left -= count;
  }
}

template <class Index, int kColumns>
LW_INLINE auto pick_rows(int rows) {
  constexpr int kMost = kTileOutputs / kColumns;
  auto run = add_group<Index, 1, kColumns>;
  if constexpr (kMost >= 2) run = rows == 2 ? add_group<Index, 2, kColumns> : run;
  if constexpr (kMost >= 4) run = rows == 3 ? add_group<Index, 3, kColumns> : rows == 4 ? add_group<Index, 4, kColumns> : run;
  if constexpr (kMost >= 8) {
    run = rows == 5 ? add_group<Index, 5, kColumns> : rows == 6 ? add_group<Index, 6, kColumns> : run;
    run = rows == 7 ? add_group<Index, 7, kColumns> : rows == 8 ? add_group<Index, 8, kColumns> : run;
  }
  return run;
}

template <class Index>
LW_INLINE auto pick_tile(const OutTile& tile) {
  switch (tile.columns) {
    case 1: return pick_rows<Index, 1>(tile.rows);
    case 2: return pick_rows<Index, 2>(tile.rows);
    case 3: return pick_rows<Index, 3>(tile.rows);
    default: return pick_rows<Index, 4>(tile.rows);
  }
}

// Where a lane's part of a tile goes, and how much of it is inside.
struct LaneOut {
  int64_t offset, rows, columns;
};

LW_INLINE int64_t inside(int64_t limit, int64_t from, int64_t most) {
  const int64_t room = limit - from;
  return room < 0 ? 0 : room < most ? room : most;
}

// Places of all lanes; says whether every lane's tile is whole.
LW_INLINE void place_lanes(const TileJob& job, const OutTile& tile, int64_t samples, LaneOut* lanes) {
  const LaneGrid& grid = job.pack.grid;
  const PlaneStrides& to = job.out.strides;
  int lane = 0;
  for (int64_t s = 0; s < grid.samples; ++s) {
    for (int64_t i = 0; i < grid.rows; ++i) {
      const int64_t row = i * job.pack.out_rows + tile.row;
      for (int64_t j = 0; j < grid.columns; ++j) {
        const int64_t column = j * job.pack.out_columns + tile.column;
        lanes[lane++] = {s * to.sample + row * to.row + column * to.column,
                         s < samples ? inside(job.out.height, row, tile.rows) : 0,
                         inside(job.out.width, column, tile.columns)};
      }
    }
  }
}

// Lanes hold neighbours of a row.
LW_INLINE void put_neighbours(const TileJob& job, const OutTile& tile, const float* sums, float* y) {
  const PlaneStrides& to = job.out.strides;
  for (int64_t r = 0; r < tile.rows; ++r) {
    for (int64_t c = 0; c < tile.columns; ++c, sums += kLanes) {
      const int64_t column = (tile.column + c) * kLanes;
      const int64_t count = inside(job.out.width, column, kLanes);
      float* out = y + (tile.row + r) * to.row + column * to.column;
      if (to.column == 1) {
        store_first(out, load(sums), int(count));
      } else {
        for (int64_t i = 0; i < count; ++i) out[i * to.column] = sums[i];
      }
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

LW_INLINE void put_blocks(const TileJob& job, const OutTile& tile, const LaneOut* lanes, const float* sums,
                          float* y) {
  const PlaneStrides& to = job.out.strides;
  for (int64_t r = 0; r < tile.rows; ++r, sums += tile.columns * kLanes, y += to.row) {
#pragma GCC unroll 1
    for (int g = 0; g < kLanes; g += 4) {
      Lanes<4> v[4] = {};
      for (int i = 0; i < tile.columns; ++i) v[i] = load_lanes<4>(sums + i * kLanes + g);
      transpose4(v);
      for (int i = 0; i < 4; ++i) {
        const LaneOut& lane = lanes[g + i];
        if (r >= lane.rows) continue;
        float* out = y + lane.offset;
        if (to.column == 1 && lane.columns == 4) {
          store_lanes<4>(out, v[i]);
        } else {
          for (int64_t c = 0; c < lane.columns; ++c) out[c * to.column] = v[i][c];
        }
      }
    }
  }
}

LW_INLINE void start_sums(const TileJob& job, int64_t first, int64_t filters, int64_t vectors, float* sums) {
  for (int64_t o = 0; o < filters; ++o) {
    const Vec start = job.bias ? broadcast(job.bias[first + o]) : zero();
    for (int64_t i = 0; i < vectors; ++i, sums += kLanes) store(sums, start);
  }
}

// y points at the first sample; samples: how many there are, at most the grid's.
void tile_convolve(const float* packed, const TileJob& job, const OutTile& tile, int64_t block,
                   int64_t samples, float* sums, float* y) {
  const SparseTiles& w = job.weight;
  const int64_t first = block * w.rows, vectors = int64_t(tile.rows) * tile.columns;
  const int64_t filters = inside(job.filters, first, w.rows);
  start_sums(job, first, filters, vectors, sums);
  const float* x = packed + tile.row * job.row_step + tile.column * kLanes;
  const auto run = w.wide ? pick_tile<int16_t>(tile) : pick_tile<uint8_t>(tile);
  for (int64_t part = 0; part < w.parts; ++part) {
    run(x + part * job.part_step, job, block, block * w.parts + part, sums);
  }
  LaneOut lanes[kLanes];
  place_lanes(job, tile, samples, lanes);
  const bool by_sample = job.out.strides.sample == 1 && job.pack.grid.samples == kLanes;
  for (int64_t o = 0; o < filters; ++o, sums += vectors * kLanes) {
    if (job.relu) {
      for (int64_t i = 0; i < vectors; ++i) store(sums + i * kLanes, relu(load(sums + i * kLanes)));
    }
    float* out = y + (first + o) * job.out.strides.channel;
    if (job.pack.interleaved) put_neighbours(job, tile, sums, out);
    else if (by_sample) put_samples(job, tile, samples, sums, out);
    else put_blocks(job, tile, lanes, sums, out);
  }
}

}  // namespace liveweight::LW_ISA
