// kernelwise_conv2d for every kernel size, stride, dilation and pool: each lane loads its operands
// by itself.
#pragma once

#include "kernelwise_conv2d_write.cuh"

namespace liveweight::cuda::kernelwise {

constexpr int kDirectThreads = 128;
constexpr int kDirectOutputs = 4;  // of one filter per thread, so that a weight is used four times

// One sum: the output at (row, column) before pooling, without bias.
__device__ inline void add_taps(const Conv& c, const float* const (&plane)[kDirectOutputs],
                                const float* weight, const int (&row)[kDirectOutputs],
                                const int (&column)[kDirectOutputs],
                                float (&sums)[kDirectOutputs]) {
  for (int i = 0; i < c.kernel[0]; ++i) {
    for (int j = 0; j < c.kernel[1]; ++j) {
      const float w = *weight++;
#pragma unroll
      for (int o = 0; o < kDirectOutputs; ++o) {
        const int y = row[o] + i * c.dilation[0], x = column[o] + j * c.dilation[1];
        if (unsigned(y) < unsigned(c.height) && unsigned(x) < unsigned(c.width)) {
          sums[o] = fmaf(w, plane[o][y * c.x_stride[2] + x * c.x_stride[3]], sums[o]);
        }
      }
    }
  }
}

// The outputs of one thread: sample, row and column after pooling.
struct Outputs {
  int64_t image[kDirectOutputs];
  int row[kDirectOutputs], column[kDirectOutputs];
};

// Largest sum of every output's window, without bias.
__device__ inline void sum_windows(const Conv& c, int filter, const Outputs& out,
                                   float (&most)[kDirectOutputs]) {
  const int64_t group_start = int64_t(filter / c.group_filters) * c.group_channels;
  const int begin = c.filter_offsets[filter], end = c.filter_offsets[filter + 1];
  const int taps = c.kernel[0] * c.kernel[1];
  for (int window = 0; window < c.pool * c.pool; ++window) {
    int row[kDirectOutputs], column[kDirectOutputs];
    float sums[kDirectOutputs] = {};
#pragma unroll
    for (int o = 0; o < kDirectOutputs; ++o) {
      row[o] = (out.row[o] * c.pool + window / c.pool) * c.stride[0] - c.padding[0];
      column[o] = (out.column[o] * c.pool + window % c.pool) * c.stride[1] - c.padding[1];
    }
    for (int k = begin; k < end; ++k) {
      const float* plane[kDirectOutputs];
#pragma unroll
      for (int o = 0; o < kDirectOutputs; ++o) {
        plane[o] = c.x + out.image[o] * c.x_stride[0] +
                   (group_start + c.channels[k]) * c.x_stride[1];
      }
      add_taps(c, plane, c.values + int64_t(k) * taps, row, column, sums);
    }
#pragma unroll
    for (int o = 0; o < kDirectOutputs; ++o) {
      most[o] = window ? max_nan(most[o], sums[o]) : sums[o];
    }
  }
}

// Blocks walk over (512 outputs, filter) pairs, filters fastest: they share x.
static __global__ void __launch_bounds__(kDirectThreads) conv_direct(Conv c) {
  const int width = c.pooled_width(), filters = c.group_filters * c.groups;
  const int64_t plane = int64_t(c.pooled_height()) * width, count = c.batch * plane;
  const int64_t work = divide_up(count, kDirectThreads * kDirectOutputs) * filters;
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    const int filter = int(item % filters);
    const int64_t first = item / filters * (kDirectThreads * kDirectOutputs) + threadIdx.x;
    Outputs out;
#pragma unroll
    for (int o = 0; o < kDirectOutputs; ++o) {
      const int64_t at = first + o * kDirectThreads, inside = at < count ? at : count - 1;
      out.image[o] = inside / plane;
      out.row[o] = int(inside % plane / width), out.column[o] = int(inside % width);
    }
    float most[kDirectOutputs];
    sum_windows(c, filter, out, most);
    const float bias = c.bias ? load_any(c.bias, filter, c.element) : 0.f;
#pragma unroll
    for (int o = 0; o < kDirectOutputs; ++o) {
      if (first + o * kDirectThreads >= count) continue;
      const int64_t to = out.image[o] * c.y_stride[0] + filter * c.y_stride[1] +
                         out.row[o] * c.y_stride[2] + out.column[o] * c.y_stride[3];
      store_any(c.y, to, rectify(most[o] + bias, c.relu), c.element);
    }
  }
}

}  // namespace liveweight::cuda::kernelwise
