// One call of kernelwise_conv2d, as its paths see it.
#pragma once

#include "conv2d.h"
#include "layout.h"

namespace liveweight {

// The kept kernels of all filters, and what follows a filter's sum.
struct KeptFilters {
  const float* values;
  const int32_t* offsets;
  const int32_t* channels;
  const float* bias;  // or null
  int64_t group_channels, group_filters;
  bool relu;
  int64_t pool;
};

}  // namespace liveweight

#ifdef LW_BASE
namespace liveweight {

struct KernelwiseConv {
  ConvSizes sizes;
  KeptFilters filters;
  const float* x;
  Layout x_layout;
  float* y;
  Layout y_layout;
  int64_t kept;

  int64_t out_height() const { return sizes.height / filters.pool; }
  int64_t out_width() const { return sizes.width / filters.pool; }
  int64_t out_pixels() const { return out_height() * out_width(); }
};

// Samples [begin, end) by each path.
void run_planes(const KernelwiseConv& conv, int64_t begin, int64_t end);
void run_lanes(const KernelwiseConv& conv, int64_t begin, int64_t end);
void run_pointwise(const KernelwiseConv& conv);  // all samples

// Whether run_pointwise knows the kernel, the layouts and what follows.
bool prefer_pointwise(const KernelwiseConv& conv);

// How many of the samples, from the first, run_lanes should take; `lanes` of a vector.
int64_t lanes_samples(const ConvSizes& s, int64_t lanes);

// Filters [from, to) in falling order of their kept kernels: then the inner loop's length repeats and
// is predicted. Equal ones keep their order.
inline std::vector<int32_t> order_filters(const int32_t* offsets, int64_t from, int64_t to) {
  int32_t most = 0;
  for (int64_t o = from; o < to; ++o) most = std::max(most, offsets[o + 1] - offsets[o]);
  std::vector<int32_t> start(size_t(most) + 2), order(size_t(to - from));
  for (int64_t o = from; o < to; ++o) ++start[size_t(most - (offsets[o + 1] - offsets[o])) + 1];
  for (size_t i = 1; i < start.size(); ++i) start[i] += start[i - 1];
  for (int64_t o = from; o < to; ++o) {
    order[size_t(start[size_t(most - (offsets[o + 1] - offsets[o]))]++)] = int32_t(o);
  }
  return order;
}

}  // namespace liveweight
#endif  // LW_BASE
