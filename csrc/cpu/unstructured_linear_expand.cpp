// unstructured_linear for one to four samples where many weights are kept: bits name the columns of a
// segment, and values are spread to their places beside each other, so that the input is read in
// whole vectors instead of gathered, and columns cost an eighth of a byte. Sums stay in lanes until
// their block of rows ends.
#include "unstructured_linear.h"

namespace liveweight::LW_ISA {

constexpr int kBytes = kLanes / 2;  // of the bits of four vectors

// Bits of `bytes` bytes in one word: popcounts and shifts of a whole word do not wait for each other.
LW_INLINE uint64_t load_bits(const uint8_t* bits, int64_t bytes) {
  uint64_t word = 0;
  __builtin_memcpy(&word, bits, size_t(bytes));
  return word;
}

template <int kSamples, class Value>
void expand_block(const float* x, int64_t step, const Tiles& w, int64_t block, float* lanes, float* sums) {
  for (int64_t i = 0; i < w.rows * kSamples; ++i) store(lanes + i * kLanes, zero());
  const int32_t* at = w.offsets + 2 * block * w.along;
  const Value* values = static_cast<const Value*>(w.values) + at[0];
  const uint8_t* bits = w.bits + at[1] * (w.columns / 8);
  for (int64_t t = 0; t < w.along; ++t, at += 2, x += w.columns) {
    const uint8_t* segment = static_cast<const uint8_t*>(w.segments) + 2 * int64_t(at[1]);
    const uint8_t* stop = static_cast<const uint8_t*>(w.segments) + 2 * int64_t(at[3]);
    for (; segment < stop; segment += 2, bits += w.columns / 8) {
      const int count = int(segment[1]) + 1;
      float* to = lanes + int64_t(segment[0]) * kSamples * kLanes;
      Vec sum[kSamples][2];  // two chains hide the latency of the multiply-add
      for (int m = 0; m < kSamples; ++m) sum[m][0] = load(to + m * kLanes), sum[m][1] = zero();
      __builtin_prefetch(bits + 512, 0, 2);
      prefetch_values(values, count);
      const Value* next = values;
      const auto add_vector = [&](uint64_t word, int64_t i, int chain) __attribute__((always_inline)) {
        const uint32_t here = uint32_t(word) & ((1u << kLanes) - 1);
        const Vec value = expand_load(next, here);
        next += popcount(here);
        for (int m = 0; m < kSamples; ++m) {
          // Removed weights are left out, not multiplied as zeros: x may hold inf or NaN there.
          Vec& part = sum[m][chain];
          part = fma(value, load(x + m * step + i * kLanes), part, mask_from_bits(here));
        }
      };
      const int64_t vectors = w.columns / kLanes;
      int64_t i = 0;
      for (; i + 4 <= vectors; i += 4) {
        const uint64_t word = load_bits(bits + i * kLanes / 8, kBytes);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) add_vector(word >> (kLanes * j), i + j, j % 2);
      }
      if (i < vectors) {  // tiles of 16, 32 or 48 columns more than a multiple of 64
        const uint64_t word = load_bits(bits + i * kLanes / 8, w.columns / 8 - i * kLanes / 8);
        for (int64_t j = 0; i + j < vectors; ++j) add_vector(word >> (kLanes * j), i + j, 0);
      }
      for (int m = 0; m < kSamples; ++m) store(to + m * kLanes, sum[m][0] + sum[m][1]);
      values += count;
    }
  }
  for (int64_t i = 0; i < w.rows * kSamples; ++i) sums[i] = reduce_add(load(lanes + i * kLanes));
}

template <class Value>
void expand_samples(const float* x, int64_t step, int samples, const Tiles& w, int64_t block, float* lanes,
                    float* sums) {
  if (samples == 1) expand_block<1, Value>(x, step, w, block, lanes, sums);
  else if (samples == 2) expand_block<2, Value>(x, step, w, block, lanes, sums);
  else if (samples == 3) expand_block<3, Value>(x, step, w, block, lanes, sums);
  else expand_block<4, Value>(x, step, w, block, lanes, sums);
}

// As linear_gather, for one to four samples and tiles with bits.
void linear_expand(const float* x, int64_t step, int samples, const Tiles& w, int64_t block, float* lanes,
                   float* sums) {
  if (w.bf16) expand_samples<Bf16>(x, step, samples, w, block, lanes, sums);
  else expand_samples<float>(x, step, samples, w, block, lanes, sums);
}

}  // namespace liveweight::LW_ISA
