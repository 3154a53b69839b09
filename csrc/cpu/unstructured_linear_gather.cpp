// unstructured_linear for one or two samples, too few to share lanes: the input is gathered by column
// number, each number once for all samples. Sums stay in lanes until their block of rows ends.
#include "unstructured_linear.h"

namespace liveweight::LW_ISA {

template <int kSamples, class Index, class Value>
void gather_block(const float* x, int64_t step, const Tiles& w, int64_t block, float* lanes, float* sums) {
  for (int64_t i = 0; i < w.rows * kSamples; ++i) store(lanes + i * kLanes, zero());
  const int32_t* at = w.offsets + 2 * block * w.along;
  const Value* values = static_cast<const Value*>(w.values) + at[0];
  const Index* places = static_cast<const Index*>(w.places) + at[0];
  for (int64_t t = 0; t < w.along; ++t, at += 2, x += w.columns) {
    const Index* segment = static_cast<const Index*>(w.segments) + 2 * int64_t(at[1]);
    const Index* stop = static_cast<const Index*>(w.segments) + 2 * int64_t(at[3]);
    for (; segment < stop; segment += 2) {
      const int count = int(segment[1]) + 1;
      float* to = lanes + int64_t(segment[0]) * kSamples * kLanes;
      Vec sum[kSamples];
      for (int m = 0; m < kSamples; ++m) sum[m] = load(to + m * kLanes);
      prefetch_entries(values, places, count);
      int i = 0;
      for (; i + kLanes <= count; i += kLanes) {
        const Vec value = load(values + i);
        for (int m = 0; m < kSamples; ++m) sum[m] = fma(value, gather(x + m * step, places + i), sum[m]);
      }
      if (i < count) {
        const Vec value = load_first(values + i, count - i);
        for (int m = 0; m < kSamples; ++m) {
          sum[m] = fma(value, gather(x + m * step, places + i, count - i), sum[m]);
        }
      }
      for (int m = 0; m < kSamples; ++m) store(to + m * kLanes, sum[m]);
      values += count;
      places += count;
    }
  }
  for (int64_t i = 0; i < w.rows * kSamples; ++i) sums[i] = reduce_add(load(lanes + i * kLanes));
}

// sums [rows of a tile, samples] of one block, for one or two samples of x, `step` apart; lanes is
// scratch of 16 times their size.
void linear_gather(const float* x, int64_t step, int samples, const Tiles& w, int64_t block, float* lanes,
                   float* sums) {
#define LW_RUN(kSamples, Value)                                                  \
  (w.wide ? gather_block<kSamples, uint16_t, Value>(x, step, w, block, lanes, sums) \
          : gather_block<kSamples, uint8_t, Value>(x, step, w, block, lanes, sums))
  if (w.bf16) samples == 1 ? LW_RUN(1, Bf16) : LW_RUN(2, Bf16);
  else samples == 1 ? LW_RUN(1, float) : LW_RUN(2, float);
#undef LW_RUN
}

}  // namespace liveweight::LW_ISA
