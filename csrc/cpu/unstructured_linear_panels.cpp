// Panels of unstructured_linear: filling them, a block of rows of the weight times a panel, and what
// becomes of the sums.
//
// The columns of a tile are so few that their part of the panel stays in the first-level cache, values
// and columns are read as one stream, and the sums of a block of rows stay close.
#include "unstructured_linear.h"

#include "activation.h"

namespace liveweight::LW_ISA {

void linear_widen(const Bf16* from, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(from + i));
  if (i < count) store_first(out + i, load_first(from + i, int(count - i)), int(count - i));
}

void linear_narrow(const float* from, int64_t count, Bf16* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(from + i));
  if (i < count) store_first(out + i, load_first(from + i, int(count - i)), int(count - i));
}

// Columns [begin, end) of the panel's samples; x[m, k] is x[m * row + k * column]. Columns from K to
// end, which fill up the last tile, become 0: no entry names them.
void linear_fill(const float* x, int64_t row, int64_t column, int64_t K, Panel panel, int64_t begin,
                 int64_t end, float* out) {
  const int64_t stop = end < K ? end : K;
  x += panel.first * row;
  if (column == 1) {
    fill_panel(x, row, panel.count, panel.width, begin, stop, out);
  } else {
    for (int64_t k = begin; k < stop; ++k) {
      const float* from = x + k * column;
      float* to = out + k * panel.width;
      int m = 0;
      for (; m + kLanes <= panel.count; m += kLanes) store(to + m, load(from + m));
      if (m < panel.count) store_first(to + m, load_first(from + m, panel.count - m), panel.count - m);
      for (m = panel.count; m < panel.width; ++m) to[m] = 0.0f;
    }
  }
  for (int64_t i = stop * panel.width; i < end * panel.width; ++i) out[i] = 0.0f;
}

// The column numbers of eight entries in one word, or of one entry.
struct Bytes {
  typedef uint8_t Index;
  uint64_t word;
  explicit Bytes(const uint8_t* p) { __builtin_memcpy(&word, p, sizeof word); }
  int64_t at(int i) const { return int64_t(word >> (8 * i) & 255); }
};
struct Shorts {
  typedef uint16_t Index;
  uint64_t word[2];
  explicit Shorts(const uint16_t* p) { __builtin_memcpy(word, p, sizeof word); }
  int64_t at(int i) const { return int64_t(word[i / 4] >> (16 * (i % 4)) & 65535); }
};

// sums[0 .. kWidth) += sum over `count` entries of value * row of the panel.
template <int kWidth, class Eight>
LW_INLINE void add_segment(const float* panel, const float* values, const typename Eight::Index* places,
                           int count, float* sums) {
  constexpr int kStep = kWidth < kLanes ? kWidth : kLanes;
  constexpr int kParts = kWidth / kStep;
  constexpr int kChains = kParts >= 4 ? 1 : 4;  // more sums hide the FMA's latency
  Lanes<kStep> acc[kChains][kParts];
#pragma GCC unroll 16
  for (int part = 0; part < kParts; ++part) acc[0][part] = load_lanes<kStep>(sums + part * kStep);
#pragma GCC unroll 8
  for (int chain = 1; chain < kChains; ++chain) {
#pragma GCC unroll 16
    for (int part = 0; part < kParts; ++part) acc[chain][part] = Lanes<kStep>{};
  }
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    const Eight eight(places + i);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const float* row = panel + eight.at(j) * kWidth;
#pragma GCC unroll 16
      for (int part = 0; part < kParts; ++part) {
        acc[j % kChains][part] += values[i + j] * load_lanes<kStep>(row + part * kStep);
      }
    }
  }
  for (; i < count; ++i) {
    const float* row = panel + int64_t(places[i]) * kWidth;
#pragma GCC unroll 16
    for (int part = 0; part < kParts; ++part) {
      acc[0][part] += values[i] * load_lanes<kStep>(row + part * kStep);
    }
  }
#pragma GCC unroll 16
  for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 8
    for (int chain = 1; chain < kChains; ++chain) acc[0][part] += acc[chain][part];
    store_lanes<kStep>(sums + part * kStep, acc[0][part]);
  }
}

constexpr int kWidened = 256;  // values of a segment that are widened at a time

LW_INLINE const float* widened(const Bf16* values, int count, float* out) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(values + i));
  if (i < count) store(out + i, load_first(values + i, count - i));
  return out;
}

template <int kWidth, class Eight, class Value>
void block_of_tiles(const float* panel, const Tiles& w, int64_t block, float* sums) {
  typedef typename Eight::Index Index;
  for (int64_t i = 0; i < w.rows * kWidth; i += 4) store_lanes<4>(sums + i, Lanes<4>{});
  const int32_t* at = w.offsets + 2 * block * w.along;
  const Value* values = static_cast<const Value*>(w.values) + at[0];
  alignas(64) float wide[kWidened];
  const Index* places = static_cast<const Index*>(w.places) + at[0];
  for (int64_t t = 0; t < w.along; ++t, at += 2, panel += w.columns * kWidth) {
    const Index* segment = static_cast<const Index*>(w.segments) + 2 * int64_t(at[1]);
    const Index* stop = static_cast<const Index*>(w.segments) + 2 * int64_t(at[3]);
    for (; segment < stop; segment += 2) {
      const int count = int(segment[1]) + 1;
      prefetch_entries(values, places, count);
      float* to = sums + int64_t(segment[0]) * kWidth;
      if constexpr (sizeof(Value) == sizeof(float)) {
        add_segment<kWidth, Eight>(panel, values, places, count, to);
      } else {
        for (int i = 0; i < count; i += kWidened) {
          const int some = count - i < kWidened ? count - i : kWidened;
          add_segment<kWidth, Eight>(panel, widened(values + i, some, wide), places + i, some, to);
        }
      }
      values += count;
      places += count;
    }
  }
}

// sums [rows of a tile, width] of one block of rows and one panel.
void linear_block(const float* panel, int width, const Tiles& w, int64_t block, float* sums) {
#define LW_RUN(kWidth)                                                          \
  (w.bf16   ? w.wide ? block_of_tiles<kWidth, Shorts, Bf16>(panel, w, block, sums) \
                     : block_of_tiles<kWidth, Bytes, Bf16>(panel, w, block, sums)  \
   : w.wide ? block_of_tiles<kWidth, Shorts, float>(panel, w, block, sums)         \
            : block_of_tiles<kWidth, Bytes, float>(panel, w, block, sums))
  if (width == 64) LW_RUN(64);
  else if (width == 32) LW_RUN(32);
  else if (width == 16) LW_RUN(16);
  else LW_RUN(8);
#undef LW_RUN
}

// sums [rows, width] (+)= bias, then the activation, in place.
LW_INLINE void activate_sums(float* sums, int width, int rows, const RowsOut& out) {
  for (int r = 0; r < rows; ++r) {
    float* row = sums + r * width;
    const float shift = out.bias ? out.bias[r] : 0.0f;
    int m = 0;
    if (out.activation <= kRelu) {
      const float low = out.activation == kRelu ? 0.0f : -__builtin_inff();
      for (; m + 4 <= width; m += 4) {
        const Lanes<4> v = load_lanes<4>(row + m) + shift;
        store_lanes<4>(row + m, v < low ? Lanes<4>{} + low : v);
      }
    }
    for (; m + kLanes <= width; m += kLanes) {
      store(row + m, activate(load(row + m) + broadcast(shift), out.activation));
    }
    for (; m < width; ++m) row[m] = activate(row[m] + shift, out.activation);
  }
}

// sums [rows, width] to act(sums + bias), transposed where samples come first in y.
void linear_finish(float* sums, int samples, int width, int rows, const RowsOut& out) {
  if (out.bias || out.activation != kNone) activate_sums(sums, width, rows, out);
  if (out.sample_step == 1) {
    for (int r = 0; r < rows; ++r) {
      float* y = out.y + r * out.row_step;
      int m = 0;
      for (; m + kLanes <= samples; m += kLanes) store(y + m, load(sums + r * width + m));
      if (m < samples) store_first(y + m, load_first(sums + r * width + m, samples - m), samples - m);
    }
  } else {
    empty_panel(sums, width, samples, rows, out.y, out.sample_step);
  }
}

}  // namespace liveweight::LW_ISA
