// What unstructured_linear and its gradients share: the tiled pattern, its checks, shares of work,
// and the kernels of the forward pass.
#pragma once

#include "dispatch.h"
#include "panels.h"

namespace liveweight {

// formats.Unstructured in memory: tiles of `rows` x `columns`, `along` of them beside each other.
struct Tiles {
  const void* values;    // float, or Bf16 where `bf16`
  const void* places;    // column in the tile: uint8, or uint16 where `wide`
  const void* segments;  // (row in the tile, entries - 1), of the same type
  const uint8_t* bits;   // columns / 8 bytes for each segment, or null
  const int32_t* offsets;
  int64_t rows, columns, along, blocks;
  bool wide, bf16;
};

// What becomes of the sums of a block of rows.
struct RowsOut {
  const float* bias;  // of the block's first row, or null
  float* y;           // of the panel's first sample and the block's first row
  int64_t sample_step, row_step;
  int activation;
};

}  // namespace liveweight

LW_DECLARE(void linear_fill(const float* x, int64_t row, int64_t column, int64_t K, Panel panel,
                            int64_t begin, int64_t end, float* out))
LW_DECLARE(void linear_block(const float* panel, int width, const Tiles& w, int64_t block, float* sums))
LW_DECLARE(void linear_finish(float* sums, int samples, int width, int rows, const RowsOut& out))
LW_DECLARE(bool linear_agrees(const Tiles& w, int64_t tiles))
LW_DECLARE(void linear_widen(const Bf16* from, int64_t count, float* out))
LW_DECLARE(void linear_narrow(const float* from, int64_t count, Bf16* out))
LW_DECLARE(void linear_gather(const float* x, int64_t step, int samples, const Tiles& w, int64_t block,
                              float* lanes, float* sums))
LW_DECLARE(void linear_expand(const float* x, int64_t step, int samples, const Tiles& w, int64_t block,
                              float* lanes, float* sums))

namespace liveweight::LW_ISA {

// Weights of a large layer come from memory once per call: fetched this many entries ahead.
constexpr int kAhead = 1024;

template <class Value>
LW_INLINE void prefetch_values(const Value* values, int count) {
  for (int i = 0; i < count; i += int(64 / sizeof(Value))) __builtin_prefetch(values + kAhead + i, 0, 2);
}
template <class Value, class Index>
LW_INLINE void prefetch_entries(const Value* values, const Index* places, int count) {
  __builtin_prefetch(places + kAhead, 0, 2);
  prefetch_values(values, count);
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {

// Threads worth waking for so many multiply-adds.
inline int64_t threads_for(double work) {
  return work < 4e5 ? 1 : int64_t(torch::stable::get_num_threads());
}

// Guards memory at the cost of one look per segment. Panels and sums are as long as whole tiles, so
// that a column or row number in its type's range can only name memory that is there.
inline Tiles check_tiles(const char* op, const Tensor& values, const Tensor& columns,
                         const Tensor& segments, const Tensor& offsets,
                         const std::vector<int64_t>& tile, int64_t N, int64_t K,
                         ScalarType dtype = ScalarType::Float) {
  LW_CHECK(tile.size() == 2 && tile[0] >= 1 && tile[0] <= 256 && tile[1] >= 1 && tile[1] <= 32768, op,
           ": tile must be within (256, 32768)");
  LW_CHECK(N >= 0, op, ": out_features must be >= 0, got ", N);
  Tiles w{};
  w.rows = tile[0], w.columns = tile[1], w.wide = tile[1] > 256;
  w.along = (K + w.columns - 1) / w.columns;
  w.blocks = (N + w.rows - 1) / w.rows;
  const ScalarType index = w.wide ? ScalarType::Short : ScalarType::Byte;
  w.values = checked_data<void>(op, "values", values, 1, dtype);
  w.bf16 = dtype == ScalarType::BFloat16;
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
  LW_CHECK(LW_SELECT(linear_agrees)(w, tiles), op, ": segments do not agree with offsets");
  return w;
}

// Bits that name other columns than places do give wrong numbers, but must not lead past the values:
// only segments close to their end could.
inline const uint8_t* check_bits(const char* op, const Tensor& bits, const Tiles& w, int64_t kept,
                                 int64_t segments) {
  if (bits.numel() == 0) return nullptr;
  LW_CHECK(!w.wide && w.columns % 16 == 0, op, ": bits need tiles of 16, 32, ... 256 columns, got ",
           w.columns);
  const uint8_t* data = checked_data<uint8_t>(op, "bits", bits, 2, ScalarType::Byte);
  const int64_t size = w.columns / 8;
  LW_CHECK(bits.size(0) == segments && bits.size(1) == size, op, ": expected bits [", segments, ", ", size,
           "], got ", shape_of(bits));
  const uint8_t* counts = static_cast<const uint8_t*>(w.segments) + 1;
  for (int64_t s = segments - 1, start = kept; s >= 0 && start + w.columns > kept; --s) {
    int count = 0;
    for (int64_t i = 0; i < size; ++i) count += __builtin_popcount(data[s * size + i]);
    LW_CHECK(count == counts[2 * s] + 1, op, ": bits do not agree with segments");
    start -= count;
  }
  return data;
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
