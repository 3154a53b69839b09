// Convolution of zero-padded planes with single 2-D kernels: the engine of kernelwise_conv2d and of
// its gradient to x.
//
// The input of a sample is copied to planes with its padding, split by stride: phase (a, b) holds
// the padded rows a, a + stride, ... and columns b, b + stride, ... There every tap of a kernel reads
// with unit stride at a fixed offset, whatever stride and dilation are:
//   out[r, c] = sum over taps of weight * plane[r + row offset, c + column offset].
// Taps above each other form a run: one load of a row serves as many output rows as the run has taps.
#pragma once

#include "lanes.h"

namespace liveweight {

struct Phase {
  int64_t row, column;
};

// Taps of one kernel column that read consecutive rows of one phase: the t-th of them reads
// plane[offset + t * row length], its weight is weights[weight + t * step].
struct Run {
  int64_t offset;
  int32_t count, weight, step;
};

constexpr int kLongestRun = 5;

// How the planes of one channel lie: phases after each other, rows of `width`, `size` floats in all.
struct PlaneShape {
  int64_t height, width, size;
  const Phase* phases;
  int64_t phase_count;
};

// A picture [height, width] and how it is cut into phases: row r of phase a is row
// r * stride - padding + a of the picture.
struct Picture {
  int64_t height, width;
  int64_t stride[2], padding[2];
};

// The kept kernels that feed one output plane: kernel i reads plane sources[i], its weights start at
// values + (order ? order[i] : i) * size.
struct KernelList {
  const float* values;
  const int32_t* sources;
  const int32_t* order;
  int32_t count, size;
};

// One phase of one output plane: which runs, and whether output rows are chained into one long row
// (flat: tiles take `lanes` positions in a row's direction and ignore those between rows).
struct Sweep {
  const Run* runs;
  int64_t run_count;
  int64_t plane_size, width;  // floats from channel to channel, and from row to row
  bool flat;
};

}  // namespace liveweight

namespace liveweight::LW_ISA {

constexpr int kWide = kLanes >= 16 ? 16 : 8;

LW_INLINE void fill_zero(float* out, int64_t count) {
  for (; count >= kLanes; count -= kLanes, out += kLanes) {
    store(out, zero());
    asm volatile("");  // else this becomes a call of memset, slow for the few floats beside a row
  }
  if (count > 0) store_first(out, zero(), int(count));
}

// out[i] = in[i * step]
LW_INLINE void copy_row(const float* in, int64_t step, float* out, int64_t count) {
  if (step == 1) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, load(in + i));
    if (i < count) store_first(out + i, load_first(in + i, int(count - i)), int(count - i));
  } else if (step == 2) {
    for (int64_t i = 0; i < count; ++i) out[i] = in[2 * i];
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = in[i * step];
  }
}

LW_INLINE int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// First index r >= 0 with r * stride + phase - padding >= limit.
LW_INLINE int64_t first_index(int64_t limit, int64_t stride, int64_t phase, int64_t padding) {
  const int64_t gap = limit + padding - phase;
  return gap > 0 ? (gap + stride - 1) / stride : 0;
}

// All phases of one picture, zeros around it.
LW_INLINE void fill_planes(const float* x, const Picture& picture, const PlaneShape& shape, float* out) {
  const int64_t sh = picture.stride[0], sw = picture.stride[1];
  const bool same = picture.height == shape.height && picture.width == shape.width;
  if (same && sh == 1 && sw == 1) return copy_row(x, 1, out, shape.height * shape.width);
  for (int64_t i = 0; i < shape.phase_count; ++i) {
    const Phase at = shape.phases[i];
    const int64_t top = clamp(first_index(0, sh, at.row, picture.padding[0]), 0, shape.height);
    const int64_t bottom =
        clamp(first_index(picture.height, sh, at.row, picture.padding[0]), top, shape.height);
    const int64_t left = clamp(first_index(0, sw, at.column, picture.padding[1]), 0, shape.width);
    const int64_t right =
        clamp(first_index(picture.width, sw, at.column, picture.padding[1]), left, shape.width);
    fill_zero(out, top * shape.width);
    const float* row = x + (top * sh + at.row - picture.padding[0]) * picture.width +
                       (left * sw + at.column - picture.padding[1]);
    float* to = out + top * shape.width;
    for (int64_t r = top; r < bottom; ++r, to += shape.width, row += sh * picture.width) {
      fill_zero(to, left);
      copy_row(row, sw, to + left, right - left);
      fill_zero(to + right, shape.width - right);
    }
    fill_zero(to, (shape.height - bottom) * shape.width);
    out += shape.height * shape.width;
  }
}

// acc[r] += sum over t < kCount of weights[t * step] * the row r + t below p.
template <int kRows, int kWidth, int kCount>
LW_INLINE void add_run(Lanes<kWidth> (&acc)[kRows], const float* p, int64_t row_step,
                       const float* weights, int64_t step) {
  float weight[kCount];
#pragma GCC unroll 8
  for (int t = 0; t < kCount; ++t) weight[t] = weights[t * step];
#pragma GCC unroll 16
  for (int row = 0; row < kRows + kCount - 1; ++row) {
    const Lanes<kWidth> v = load_lanes<kWidth>(p + row * row_step);
#pragma GCC unroll 8
    for (int t = 0; t < kCount; ++t) {
      const int r = row - t;
      if (r >= 0 && r < kRows) acc[r] += weight[t] * v;
    }
  }
}

template <int kRows, int kWidth>
LW_INLINE void add_kernel(Lanes<kWidth> (&acc)[kRows], const float* plane, const float* weights,
                          const Sweep& sweep, int64_t row_step) {
  for (const Run *run = sweep.runs, *end = run + sweep.run_count; run < end; ++run) {
    const float* p = plane + run->offset;
    const float* w = weights + run->weight;
    switch (run->count) {
      case 1: add_run<kRows, kWidth, 1>(acc, p, row_step, w, run->step); break;
      case 2: add_run<kRows, kWidth, 2>(acc, p, row_step, w, run->step); break;
      case 3: add_run<kRows, kWidth, 3>(acc, p, row_step, w, run->step); break;
      case 4: add_run<kRows, kWidth, 4>(acc, p, row_step, w, run->step); break;
      default: add_run<kRows, kWidth, 5>(acc, p, row_step, w, run->step);
    }
  }
}

// kRows x kWidth outputs, starting where `planes` points, over all kept kernels.
template <int kRows, int kWidth>
void convolve_tile(const float* planes, const KernelList& kernels, const Sweep& sweep,
                   int64_t row_step, float* out, int64_t out_step) {
  constexpr int kChains = kRows <= 4 ? 2 : 1;  // few rows: two sums of each hide the FMA's latency
  Lanes<kWidth> acc[kChains][kRows] = {};
  int32_t i = 0;
  for (; i + kChains <= kernels.count; i += kChains) {
#pragma GCC unroll 2
    for (int chain = 0; chain < kChains; ++chain) {
      const int64_t at = kernels.order ? kernels.order[i + chain] : i + chain;
      add_kernel<kRows, kWidth>(acc[chain], planes + kernels.sources[i + chain] * sweep.plane_size,
                                kernels.values + at * kernels.size, sweep, row_step);
    }
  }
  if (kChains == 2 && i < kernels.count) {
    const int64_t at = kernels.order ? kernels.order[i] : i;
    add_kernel<kRows, kWidth>(acc[0], planes + kernels.sources[i] * sweep.plane_size,
                              kernels.values + at * kernels.size, sweep, row_step);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    if (kChains == 2) acc[0][r] += acc[kChains - 1][r];
    store_lanes<kWidth>(out + r * out_step, acc[0][r]);
  }
}

template <int kWidth>
LW_INLINE void convolve_column(const float* planes, const KernelList& kernels, const Sweep& sweep,
                               int64_t rows, int64_t row_step, float* out, int64_t out_step) {
  // Tiles of at most 8 rows, as equal as possible.
  for (int64_t tiles = (rows + 7) / 8, done = 0; tiles > 0; --tiles) {
    const int64_t count = (rows - done + tiles - 1) / tiles;
    const float* p = planes + done * row_step;
    float* to = out + done * out_step;
    switch (count) {
      case 1: convolve_tile<1, kWidth>(p, kernels, sweep, row_step, to, out_step); break;
      case 2: convolve_tile<2, kWidth>(p, kernels, sweep, row_step, to, out_step); break;
      case 3: convolve_tile<3, kWidth>(p, kernels, sweep, row_step, to, out_step); break;
      case 4: convolve_tile<4, kWidth>(p, kernels, sweep, row_step, to, out_step); break;
      case 5: convolve_tile<5, kWidth>(p, kernels, sweep, row_step, to, out_step); break;
      case 6: convolve_tile<6, kWidth>(p, kernels, sweep, row_step, to, out_step); break;
      case 7: convolve_tile<7, kWidth>(p, kernels, sweep, row_step, to, out_step); break;
      default: convolve_tile<8, kWidth>(p, kernels, sweep, row_step, to, out_step);
    }
    done += count;
  }
}

// rows x columns outputs into out, rows `out_step` apart (flat: sweep.width apart); writes whole
// vectors, up to 15 floats past the last column.
LW_INLINE void convolve(const float* planes, const KernelList& kernels, const Sweep& sweep,
                        int64_t rows, int64_t columns, float* out, int64_t out_step) {
  if (sweep.flat) {
    const int64_t vectors = ((rows - 1) * sweep.width + columns + kWide - 1) / kWide;
    return convolve_column<kWide>(planes, kernels, sweep, vectors, kWide, out, kWide);
  }
  for (int64_t c = 0; c < columns;) {
    if (columns - c > 8 && kWide == 16) {
      convolve_column<kWide>(planes + c, kernels, sweep, rows, sweep.width, out + c, out_step);
      c += kWide;
    } else {
      convolve_column<8>(planes + c, kernels, sweep, rows, sweep.width, out + c, out_step);
      c += 8;
    }
  }
}

}  // namespace liveweight::LW_ISA
