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

  bool contiguous() const { return x_layout == Layout::contiguous && y_layout == Layout::contiguous; }
  int64_t out_height() const { return sizes.height / filters.pool; }
  int64_t out_width() const { return sizes.width / filters.pool; }
  int64_t out_pixels() const { return out_height() * out_width(); }
};

// All samples, by the path that suits the shape; conv in fp32, or with its operands and result in bf16.
void run_fp32(const KernelwiseConv& conv);
void run_contiguous(const KernelwiseConv& conv, int64_t begin, int64_t end);
void run_turned(const KernelwiseConv& conv, int64_t begin, int64_t end);  // by contiguous copies
void run_bf16(KernelwiseConv conv, const Bf16* x, const Bf16* values, const Bf16* bias, Bf16* y);

// Samples [begin, end) by each path; all but run_lanes and run_pointwise know the contiguous layout only.
void run_planes(const KernelwiseConv& conv, int64_t begin, int64_t end);
void run_lanes(const KernelwiseConv& conv, int64_t begin, int64_t end);
void run_wide(const KernelwiseConv& conv, int64_t begin, int64_t end);
void run_folded(const KernelwiseConv& conv, int64_t begin, int64_t end);
void run_strided(const KernelwiseConv& conv, int64_t begin, int64_t end);
void run_pointwise(const KernelwiseConv& conv);  // all samples

// Whether run_pointwise knows the kernel, the layouts and what follows.
bool prefer_pointwise(const KernelwiseConv& conv);

// Whether run_wide, run_folded or run_strided knows the kernel and the size of the picture; `lanes` of a vector.
bool prefer_wide(const ConvSizes& s, int64_t lanes);
bool prefer_folded(const ConvSizes& s, int64_t lanes);
bool prefer_strided(const KernelwiseConv& conv, int64_t lanes);

// How many of the samples, from the first, run_lanes should take; `lanes` of a vector.
int64_t lanes_samples(const KernelwiseConv& conv, int64_t lanes);

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

// 3 x 3 kernels that kernelwise_conv2d_sums.h takes.
inline bool fits_sums(const ConvSizes& s) {
  bool fits = true;
  for (int d = 0; d < 2; ++d) fits &= s.kernel[d] == 3 && s.stride[d] == 1 && s.dilation[d] == 1 && s.padding[d] <= 1;
  return fits;
}

// Items [first, last), samples or sets of them, by fill and filters of `run`: workers take items of their
// own where there are enough, else all fill the items together and take a share of the filters each.
template <class Run>
void run_items(const Run& run, const KernelwiseConv& conv, int64_t first, int64_t last) {
  const ConvSizes& s = conv.sizes;
  const int32_t* offsets = conv.filters.offsets;
  const int64_t threads = threads_for(s, conv.kept), items = last - first;
  const auto clear_slack = [&](float* end) { std::fill_n(end, kSlack, 0.0f); };
  if (threads == 1 || items % threads == 0 || items >= 8 * threads) {
    const std::vector<int32_t> order = order_filters(offsets, 0, s.filters);
    parallel_for(items, (items + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      int64_t floats = 0;
      for (int64_t i = first + begin; i < first + end; ++i) floats = std::max(floats, run.buffer_floats(i));
      Workspace<float> buffer(floats + kSlack), scratch(run.scratch_floats());
      for (int64_t i = first + begin; i < first + end; ++i) {
        clear_slack(buffer.data() + run.buffer_floats(i));
        run.fill(i, 0, s.C, buffer.data());
        run.filters(i, 0, s.filters, order, buffer.data(), scratch.data());
      }
    });
    return;
  }
  std::vector<int64_t> starts{0};
  for (int64_t i = first; i < last; ++i) starts.push_back(starts.back() + run.buffer_floats(i) + kSlack);
  Workspace<float> buffer(starts.back());
  parallel_for(s.C, (s.C + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = first; i < last; ++i) run.fill(i, begin, end, buffer.data() + starts[size_t(i - first)]);
  });
  for (size_t i = 1; i < starts.size(); ++i) clear_slack(buffer.data() + starts[i] - kSlack);
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    Workspace<float> scratch(run.scratch_floats());
    const int64_t from = share_kernels(offsets, s.filters, begin, threads);
    const int64_t to = share_kernels(offsets, s.filters, end, threads);
    const std::vector<int32_t> order = order_filters(offsets, from, to);
    for (int64_t i = first; i < last; ++i) {
      run.filters(i, from, to, order, buffer.data() + starts[size_t(i - first)], scratch.data());
    }
  });
}

}  // namespace liveweight
#endif  // LW_BASE
