// What follows a filter's sums: bias, activation and pool.
#pragma once

#include "lanes.h"

namespace liveweight::LW_ISA {

LW_INLINE Vec activate(Vec v, Vec shift, bool use_relu) {
  v = v + shift;
  return use_relu ? relu(v) : v;
}

// y = act(in + bias), row by row.
LW_INLINE void finish_rows(const float* in, int64_t step, int64_t rows, int64_t columns, float bias,
                           bool use_relu, float* y) {
  const Vec shift = broadcast(bias);
  if (step == columns) columns *= rows, step = columns, rows = 1;
  for (int64_t r = 0; r < rows; ++r, in += step, y += columns) {
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) store(y + c, activate(load(in + c), shift, use_relu));
    if (c < columns) store_first(y + c, activate(load(in + c), shift, use_relu), int(columns - c));
  }
}

// Largest of each pool x pool square; the bias and ReLU keep the order, so they come after it. The
// largest of each column replaces the first row of the square.
LW_INLINE void finish_pool(float* in, int64_t step, int64_t rows, int64_t columns, int64_t pool,
                           float bias, bool use_relu, float* y) {
  const int64_t out_columns = columns / pool;
  for (int64_t r = 0; r + pool <= rows; r += pool, in += pool * step, y += out_columns) {
    for (int64_t c = 0; c < columns; c += 8) {
      Lanes<8> best = load_lanes<8>(in + c);
      for (int64_t i = 1; i < pool; ++i) best = max_or_nan(best, load_lanes<8>(in + i * step + c));
      __builtin_memcpy(in + c, &best, size_t(columns - c < 8 ? columns - c : 8) * sizeof(float));
    }
    int64_t c = 0;
    for (; pool == 2 && c + 4 <= out_columns; c += 4) {
      const Lanes<4> low = load_lanes<4>(in + 2 * c), high = load_lanes<4>(in + 2 * c + 4);
      const Lanes<4> even = LW_SHUFFLE(low, high, 0, 2, 4, 6), odd = LW_SHUFFLE(low, high, 1, 3, 5, 7);
      Lanes<4> best = max_or_nan(even, odd) + bias;
      if (use_relu) best = best < 0.0f ? Lanes<4>{} : best;
      store_lanes<4>(y + c, best);
    }
    for (; c < out_columns; ++c) {
      float best = in[c * pool];
      for (int64_t i = 1; i < pool; ++i) {
        const float other = in[c * pool + i];
        best = other > best || other != other ? other : best;
      }
      best += bias;
      y[c] = use_relu && best < 0.0f ? 0.0f : best;
    }
  }
}

}  // namespace liveweight::LW_ISA
