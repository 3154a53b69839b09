// What unstructured_linear and its gradients share: the tiled pattern, its checks, shares of work.
#pragma once

#include "dispatch.h"
#include "panels.h"

namespace liveweight {

// formats.Unstructured in memory: tiles of `rows` x `columns`, `along` of them beside each other.
struct Tiles {
  const float* values;
  const void* places;    // column in the tile: uint8, or uint16 where `wide`
  const void* segments;  // (row in the tile, entries - 1), of the same type
  const int32_t* offsets;
  int64_t rows, columns, along, blocks;
  bool wide;
};

}  // namespace liveweight

LW_DECLARE(void linear_gather(const float* x, int64_t step, int samples, const Tiles& w, int64_t block,
                              float* lanes, float* sums))

namespace liveweight::LW_ISA {

// Weights of a large layer come from memory once per call: fetched this many entries ahead.
constexpr int kAhead = 1024;

template <class Index>
LW_INLINE void prefetch_entries(const float* values, const Index* places, int count) {
  __builtin_prefetch(places + kAhead, 0, 2);
  for (int i = 0; i < count; i += 16) __builtin_prefetch(values + kAhead + i, 0, 2);
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {

// Threads worth waking for so many multiply-adds.
inline int64_t threads_for(double work) {
  return work < 4e5 ? 1 : int64_t(torch::stable::get_num_threads());
}

template <class Index>
bool counts_agree(const Tiles& w, int64_t tiles) {
  const Index* segments = static_cast<const Index*>(w.segments);
  bool inside = true;
  for (int64_t i = 0; i < tiles; ++i) {
    const int32_t *at = w.offsets + 2 * i, *next = at + 2;
    inside &= at[0] <= next[0] && at[1] <= next[1];
    if (!inside) return false;
    int64_t entries = 0, row = 0;
    for (int32_t s = at[1]; s < next[1]; ++s) {
      row = std::max<int64_t>(row, segments[2 * s]);
      entries += int64_t(segments[2 * s + 1]) + 1;
    }
    inside &= entries == next[0] - at[0] && row < w.rows;
  }
  return inside;
}

// Guards memory at the cost of one look per segment. Panels and sums are as long as whole tiles, so
// that a column or row number in its type's range can only name memory that is there.
inline Tiles check_tiles(const char* op, const Tensor& values, const Tensor& columns,
                         const Tensor& segments, const Tensor& offsets,
                         const std::vector<int64_t>& tile, int64_t N, int64_t K) {
  LW_CHECK(tile.size() == 2 && tile[0] >= 1 && tile[0] <= 256 && tile[1] >= 1 && tile[1] <= 32768, op,
           ": tile must be within (256, 32768)");
  LW_CHECK(N >= 0, op, ": out_features must be >= 0, got ", N);
  Tiles w{};
  w.rows = tile[0], w.columns = tile[1], w.wide = tile[1] > 256;
  w.along = (K + w.columns - 1) / w.columns;
  w.blocks = (N + w.rows - 1) / w.rows;
  const ScalarType index = w.wide ? ScalarType::Short : ScalarType::Byte;
  w.values = checked_data<float>(op, "values", values, 1, ScalarType::Float);
  w.places = checked_data<void>(op, "columns", columns, 1, index);
  w.segments = checked_data<void>(op, "segments", segments, 2, index);
  w.offsets = checked_data<int32_t>(op, "offsets", offsets, 2, ScalarType::Int);
  const int64_t tiles = w.along * w.blocks, kept = columns.numel(), rows = segments.size(0);
  LW_CHECK(segments.size(1) == 2, op, ": expected segments [S, 2], got ", shape_of(segments));
  LW_CHECK(offsets.size(0) == tiles + 1 && offsets.size(1) == 2, op, ": expected offsets [", tiles + 1,
           ", 2], got ", shape_of(offsets));
  LW_CHECK(values.numel() == kept, op, ": expected ", kept, " values, got ", values.numel());
  const int32_t *first = w.offsets, *last = w.offsets + 2 * tiles;
  LW_CHECK(first[0] == 0 && first[1] == 0 && last[0] == kept && last[1] == rows, op,
           ": offsets must rise from (0, 0) to (", kept, ", ", rows, ")");
  const bool agree = w.wide ? counts_agree<uint16_t>(w, tiles) : counts_agree<uint8_t>(w, tiles);
  LW_CHECK(agree, op, ": segments do not agree with offsets");
  return w;
}

inline int64_t kept_entries(const Tiles& w) { return w.offsets[2 * w.along * w.blocks]; }

// Block of rows at which part `part` of `parts` begins when entries are shared evenly.
inline int64_t share_blocks(const Tiles& w, int64_t part, int64_t parts) {
  if (part == parts) return w.blocks;
  const double cost = double(kept_entries(w)) + double(w.blocks * w.rows);
  int64_t block = 0;
  while (block < w.blocks) {
    // A block belongs to the part in which its middle lies.
    const double middle = 0.5 * (double(w.offsets[2 * w.along * block]) +
                                 double(w.offsets[2 * w.along * (block + 1)])) +
                          (double(block) + 0.5) * double(w.rows);
    if (middle * double(parts) >= cost * double(part)) break;
    ++block;
  }
  return block;
}

}  // namespace liveweight
#endif  // LW_BASE
