// The inner loops of unstructured_conv2d: one tile of outputs of one block of filters, over all tiles
// of the weight, then bias and ReLU while the sums are in cache.
#include "four_lanes.h"
#include "unstructured_conv2d.h"

namespace liveweight::LW_ISA {

// One filter's entries in a tile: where they begin in the tile, how many, and where its sums are.
struct Segment {
  int64_t first, count;
  float* sums;
};

// What the segments of a tile share. One index serves values and columns: many segments go side by
// side, and registers for addresses are few.
template <class Index>
struct Entries {
  const float* values;
  const Index* columns;
  const int64_t* table;
  const float* x;
  int64_t row_step;
};

// One entry into kRows x kColumns vectors of sums.
template <class Index, int kRows, int kColumns>
LW_INLINE void add_entry(const Entries<Index>& e, int64_t at, Vec (&sums)[kRows * kColumns]) {
  const float* p = e.x + e.table[e.columns[at]];
  const Vec weight = broadcast(e.values[at]);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      sums[r * kColumns + c] = fma(weight, load(p + r * e.row_step + c * kLanes), sums[r * kColumns + c]);
    }
  }
}

// Few sums wait for each other's multiply-adds, so several segments, about as long, go side by side.
template <class Index, int kRows, int kColumns, int kSegments>
LW_INLINE void add_segments(const Segment (&s)[kSegments], const Entries<Index>& entries) {
  constexpr int kSums = kRows * kColumns;
  Vec sums[kSegments][kSums];
  int64_t at[kSegments], common = s[0].count;
#pragma GCC unroll 8
  for (int i = 0; i < kSegments; ++i) {
    if (s[i].count < common) common = s[i].count;
    at[i] = s[i].first;
#pragma GCC unroll 8
    for (int v = 0; v < kSums; ++v) sums[i][v] = load(s[i].sums + v * kLanes);
  }
#pragma GCC unroll 1
  for (const int64_t end = at[0] + common; at[0] < end;) {
#pragma GCC unroll 8
    for (int i = 0; i < kSegments; ++i) add_entry<Index, kRows, kColumns>(entries, at[i]++, sums[i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSegments; ++i) {
#pragma GCC unroll 1
    for (const int64_t end = s[i].first + s[i].count; kSegments > 1 && at[i] < end;) {
      add_entry<Index, kRows, kColumns>(entries, at[i]++, sums[i]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kSums; ++v) store(s[i].sums + v * kLanes, sums[i][v]);
  }
}

// A single vector of sums: entries of one segment take turns with four sums of it.
template <class Index>
LW_INLINE void add_alone(const Segment& s, const Entries<Index>& e) {
  Vec sum[4] = {load(s.sums), zero(), zero(), zero()};
  int64_t at = s.first;
  const int64_t end = s.first + s.count;
#pragma GCC unroll 1
  for (; at + 4 <= end; at += 4) {
    Index column[4];
    __builtin_memcpy(column, e.columns + at, sizeof column);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i] = fma(broadcast(e.values[at + i]), load(e.x + e.table[column[i]]), sum[i]);
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    if (at + i < end) sum[i] = fma(broadcast(e.values[at + i]), load(e.x + e.table[e.columns[at + i]]), sum[i]);
  }
  store(s.sums, (sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// All segments of a group. However wrong the index is, no memory outside is touched: counts are
// bounded here, and the table, sums and shifts have room for any row and column.
template <class Index, int kRows, int kColumns>
void add_group(const float* x, const TileJob& job, int64_t block, int64_t group, float* sums) {
  constexpr int kSums = kRows * kColumns;
  constexpr int kSegments = kSums == 1 ? 1 : kSums == 2 ? 4 : kSums <= 4 ? 2 : 1;
  const int32_t *from = job.weight.offsets + 2 * group, *to = from + 2;
  Entries<Index> entries{job.weight.values + from[0],
                         static_cast<const Index*>(job.weight.columns) + from[0], job.table, x,
                         job.row_step};
  const Index* segment = static_cast<const Index*>(job.weight.segments) + 2 * int64_t(from[1]);
  const Index* end = static_cast<const Index*>(job.weight.segments) + 2 * int64_t(to[1]);
  const int64_t total = to[0] - from[0];
  int64_t first = 0;
  const auto next = [&]() __attribute__((always_inline)) {
    int64_t count = int64_t(segment[1]) + 1;
    if (count > total - first) count = total - first;
    const Segment s{first, count, sums + segment[0] * (kSums * kLanes)};
    first += count;
    segment += 2;
    return s;
  };
  while (kSegments > 1 && !job.shift && segment + 2 * kSegments <= end) {
    Segment s[kSegments];
#pragma GCC unroll 8
    for (int i = 0; i < kSegments; ++i) s[i] = next();
    add_segments<Index, kRows, kColumns>(s, entries);
  }
  while (segment < end) {
    if (job.shift) entries.x = x + job.shift[block * job.weight.rows + segment[0]];
    const Segment s[1] = {next()};
    if constexpr (kSums == 1) add_alone<Index>(s[0], entries);
    else add_segments<Index, kRows, kColumns>(s, entries);
  }
}

template <class Index, int kColumns>
LW_INLINE auto pick_rows(int rows) {
  constexpr int kMost = kTileOutputs / kColumns;
  auto run = add_group<Index, 1, kColumns>;
  if constexpr (kMost >= 2) run = rows == 2 ? add_group<Index, 2, kColumns> : run;
  if constexpr (kMost >= 4) {
    run = rows == 3 ? add_group<Index, 3, kColumns> : rows == 4 ? add_group<Index, 4, kColumns> : run;
  }
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
  const bool whole = place_lanes(job, tile, samples, lanes);
  const bool by_sample = job.out.strides.sample == 1 && job.pack.grid.samples == kLanes;
  for (int64_t o = 0; o < filters; ++o, sums += vectors * kLanes) {
    if (job.relu) {
      for (int64_t i = 0; i < vectors; ++i) store(sums + i * kLanes, relu(load(sums + i * kLanes)));
    }
    float* out = y + (first + o) * job.out.strides.channel;
    if (job.pack.interleaved) put_neighbours(job, tile, sums, out);
    else if (by_sample) put_samples(job, tile, samples, sums, out);
    else put_blocks(job, tile, lanes, whole, sums, out);
  }
}

}  // namespace liveweight::LW_ISA
