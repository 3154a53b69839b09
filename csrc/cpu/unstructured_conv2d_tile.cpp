// The inner loops of unstructured_conv2d: one tile of outputs of one block of filters, over all tiles
// of the weight, then bias and ReLU while the sums are in cache.
#include "unstructured_conv2d_put.h"

namespace liveweight::LW_ISA {

// One filter's entries in a tile: where they begin in the tile, how many, what its sums were (null: all
// `start`) and where they go.
struct Segment {
  int64_t row, first, count;
  const float* from;
  float start;
  float* to;
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

// One entry into kRows x kColumns vectors of sums. kTight: rows of x have just the columns that the taps of
// a 3 x 3 kernel need, so that all offsets are known.
template <class Index, int kRows, int kColumns, bool kTight>
LW_INLINE void add_entry(const Entries<Index>& e, int64_t at, Vec (&sums)[kRows * kColumns]) {
  const float* p = e.x + e.table[e.columns[at]];
  const Vec weight = broadcast(e.values[at]);
  const int64_t row_step = kTight ? (kColumns + 2) * kLanes : e.row_step;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      sums[r * kColumns + c] = fma(weight, load(p + r * row_step + c * kLanes), sums[r * kColumns + c]);
    }
  }
}

// Few sums wait for each other's multiply-adds, so several segments, about as long, go side by side.
template <class Index, int kRows, int kColumns, bool kTight, int kSegments>
LW_INLINE void add_segments(const Segment (&s)[kSegments], const Entries<Index>& entries) {
  constexpr int kSums = kRows * kColumns;
  Vec sums[kSegments][kSums];
  int64_t at[kSegments], common = s[0].count;
#pragma GCC unroll 16
  for (int i = 0; i < kSegments; ++i) {
    if (s[i].count < common) common = s[i].count;
    at[i] = s[i].first;
#pragma GCC unroll 16
    for (int v = 0; v < kSums; ++v) sums[i][v] = s[i].from ? load(s[i].from + v * kLanes) : broadcast(s[i].start);
  }
#pragma GCC unroll 1
  for (const int64_t end = at[0] + common; at[0] < end;) {
    add_entry<Index, kRows, kColumns, kTight>(entries, at[0]++, sums[0]);
    if constexpr (kSegments > 1) add_entry<Index, kRows, kColumns, kTight>(entries, at[1]++, sums[1]);
    if constexpr (kSegments > 2) add_entry<Index, kRows, kColumns, kTight>(entries, at[2]++, sums[2]);
    if constexpr (kSegments > 3) add_entry<Index, kRows, kColumns, kTight>(entries, at[3]++, sums[3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSegments; ++i) {
#pragma GCC unroll 1
    for (const int64_t end = s[i].first + s[i].count; kSegments > 1 && at[i] < end;) {
      add_entry<Index, kRows, kColumns, kTight>(entries, at[i]++, sums[i]);
    }
#pragma GCC unroll 16
    for (int v = 0; v < kSums; ++v) store(s[i].to + v * kLanes, sums[i][v]);
  }
}

// A single vector of sums: entries of one segment take turns with four sums of it.
template <class Index>
LW_INLINE void add_alone(const Segment& s, const Entries<Index>& e) {
  Vec sum[4] = {s.from ? load(s.from) : broadcast(s.start), zero(), zero(), zero()};
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
  store(s.to, (sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// The segments of a group, and what is done beside adding: the first part of channels starts the sums,
// and the last hands them on while they are in the first-level cache. Rows touched are marked.
struct Group {
  const TileJob& job;
  const OutTile& tile;
  const LaneOut* lanes;
  bool whole;              // no lane's tile sticks out
  int64_t block, samples, filters;
  float *sums, *y;         // y: of the block's first filter
  Ahead& ahead;
  uint64_t started[kMostRows / 64], finished[kMostRows / 64];
  bool first, last;        // part of channels
};

LW_INLINE void mark(uint64_t* rows, int64_t row) { rows[row / 64] |= uint64_t(1) << row % 64; }
LW_INLINE bool marked(const uint64_t* rows, int64_t row) { return rows[row / 64] >> row % 64 & 1; }

// Activation of a filter's sums, which then go to y. Not inlined: every tile size calls it.
static __attribute__((noinline)) void put_filter(Group& g, int64_t row, float* sums) {
  const TileJob& job = g.job;
  const int64_t vectors = int64_t(g.tile.rows) * g.tile.columns;
  if (job.relu) {
    for (int64_t i = 0; i < vectors; ++i) store(sums + i * kLanes, relu(load(sums + i * kLanes)));
  }
  const bool by_sample = job.out.strides.sample == 1 && job.pack.grid.samples == kLanes;
  float* out = g.y + row * job.out.strides.channel;
  if (job.pack.paired && g.whole) put_pairs(job, g.tile, g.lanes, sums, out);
  else if (job.pack.interleaved) put_neighbours(job, g.tile, sums, out);
  else if (by_sample) put_samples(job, g.tile, g.samples, sums, out);
  else put_blocks(job, g.tile, g.lanes, g.whole, sums, out);
}

constexpr int kFusedSums = 8;   // fewer stay in the first-level cache: not worth the marks
constexpr int kAheadLines = 4;  // fetched beside every segment

LW_INLINE void fetch_ahead(Ahead& ahead) {
  if (ahead.next >= ahead.end) return;
#pragma GCC unroll 4
  for (int i = 0; i < kAheadLines; ++i) prefetch(ahead.next + i * 16);
  ahead.next += kAheadLines * 16;
}

// All segments of a group. However wrong the index is, no memory outside is touched: counts are
// bounded here, and the table, sums and shifts have room for any row and column.
template <class Index, int kRows, int kColumns, bool kTight>
void add_group(const float* x, Group& g, int64_t group) {
  constexpr int kSums = kRows * kColumns;
  constexpr int kSegments = kSums == 1 ? 1 : kSums == 2 ? 4 : kSums <= 4 ? 2 : 1;
  const TileJob& job = g.job;
  const int32_t *from = job.weight.offsets + 2 * group, *to = from + 2;
  Entries<Index> entries{job.weight.values + from[0],
                         static_cast<const Index*>(job.weight.columns) + from[0], job.table, x,
                         job.row_step};
  const Index* segment = static_cast<const Index*>(job.weight.segments) + 2 * int64_t(from[1]);
  const Index* end = static_cast<const Index*>(job.weight.segments) + 2 * int64_t(to[1]);
  const int64_t total = to[0] - from[0];
  int64_t first = 0;
  alignas(64) float done[kSegments * kSums * kLanes];
  const float* bias = job.bias ? job.bias + g.block * job.weight.rows : nullptr;
  const auto next = [&](int i) __attribute__((always_inline)) {
    int64_t count = int64_t(segment[1]) + 1;
    if (count > total - first) count = total - first;
    const int64_t row = segment[0];
    float* sums = g.sums + row * (kSums * kLanes);
    segment += 2;
    first += count;
    if (kSums < kFusedSums) return Segment{row, first - count, count, sums, 0.0f, sums};
    const bool fresh = g.first && !marked(g.started, row);
    const float start = bias && row < g.filters ? bias[row] : 0.0f;
    if (g.first) mark(g.started, row);
    float* to = g.last ? done + i * (kSums * kLanes) : sums;
    return Segment{row, first - count, count, fresh ? nullptr : sums, start, to};
  };
  const auto finish = [&](const Segment& s) __attribute__((always_inline)) {
    if (kSums < kFusedSums || !g.last || s.row >= g.filters) return;
    mark(g.finished, s.row);
    put_filter(g, s.row, s.to);
  };
  while (kSegments > 1 && !job.shift && segment + 2 * kSegments <= end) {
    Segment s[kSegments];
#pragma GCC unroll 16
    for (int i = 0; i < kSegments; ++i) s[i] = next(i);
    add_segments<Index, kRows, kColumns, kTight>(s, entries);
    fetch_ahead(g.ahead);
#pragma GCC unroll 16
    for (int i = 0; i < kSegments; ++i) finish(s[i]);
  }
  while (segment < end) {
    if (job.shift) entries.x = x + job.shift[g.block * job.weight.rows + segment[0]];
    const Segment s[1] = {next(0)};
    fetch_ahead(g.ahead);
    if constexpr (kSums == 1) add_alone<Index>(s[0], entries);
    else add_segments<Index, kRows, kColumns, kTight>(s, entries);
    finish(s[0]);
  }
}

template <class Index, int kColumns, bool kTight, int kRows = 1>
LW_INLINE auto pick_rows(int rows) {
  constexpr int kMost = kRegisters >= 32 ? kTileOutputs : kTileOutputs / 2;
  auto run = add_group<Index, kRows, kColumns, kTight>;
  if constexpr (kRows < kMostTileRows && (kRows + 1) * kColumns <= kMost) {
    if (rows > kRows) run = pick_rows<Index, kColumns, kTight, kRows + 1>(rows);
  }
  return run;
}

template <class Index>
LW_INLINE auto pick_tile(const OutTile& tile, int64_t row_step) {
  const bool tight = row_step == (tile.columns + 2) * kLanes;
  switch (tile.columns) {
    case 1: return pick_rows<Index, 1, false>(tile.rows);
    case 2: return tight ? pick_rows<Index, 2, true>(tile.rows) : pick_rows<Index, 2, false>(tile.rows);
    case 3: return pick_rows<Index, 3, false>(tile.rows);
    default: return tight ? pick_rows<Index, 4, true>(tile.rows) : pick_rows<Index, 4, false>(tile.rows);
  }
}

// Sums of filters without entries in the first part.
LW_INLINE void start_others(const Group& g) {
  const int64_t vectors = int64_t(g.tile.rows) * g.tile.columns;
  for (int64_t o = 0; o < g.filters; ++o) {
    if (marked(g.started, o)) continue;
    const Vec start = g.job.bias ? broadcast(g.job.bias[g.block * g.job.weight.rows + o]) : zero();
    for (int64_t i = 0; i < vectors; ++i) store(g.sums + (o * vectors + i) * kLanes, start);
  }
}

// y points at the first sample; samples: how many there are, at most the grid's.
void tile_convolve(const float* packed, const TileJob& job, const OutTile& tile, int64_t block,
                   int64_t samples, Ahead& ahead, float* sums, float* y) {
  const SparseTiles& w = job.weight;
  const int64_t first = block * w.rows, vectors = int64_t(tile.rows) * tile.columns;
  LaneOut lanes[kLanes];
  const bool whole = place_lanes(job, tile, samples, lanes);
  Group g{job, tile, lanes, whole, block, samples, inside(job.filters, first, w.rows), sums,
          y + first * job.out.strides.channel, ahead, {}, {}, true, false};
  const float* x = packed + tile.row * job.row_step + tile.column * kLanes;
  const auto run = w.wide ? pick_tile<int16_t>(tile, job.row_step) : pick_tile<uint8_t>(tile, job.row_step);
  const bool fused = vectors >= kFusedSums && w.parts > 0;
  if (!fused) start_others(g);
  for (int64_t part = 0; part < w.parts; ++part) {
    g.first = part == 0, g.last = part == w.parts - 1;
    run(x + part * job.part_step, g, block * w.parts + part);
    if (g.first && fused) start_others(g);
  }
  for (int64_t o = 0; o < g.filters; ++o) {
    if (!marked(g.finished, o)) put_filter(g, o, sums + o * vectors * kLanes);
  }
}

}  // namespace liveweight::LW_ISA
