// Gradient of a convolution to the kernels that it keeps, at sparse cost.
//
// Each kept kernel is a handful of dot products: its filter's output gradient with its channel's
// planes, shifted by each tap. Each number has one owner, which adds sample after sample.
#include "conv2d.h"

namespace liveweight {

struct GradValuesJob {
  Picture picture;
  PlaneShape planes;
  const int64_t* taps;  // offset of each tap in the planes of a channel
  int64_t kernel_size, height, width;
  int64_t group_channels, group_filters;
  const int32_t* offsets;
  const int32_t* channels;
};

}  // namespace liveweight

LW_DECLARE(void grad_values_fill(const float* x, const GradValuesJob& job, int64_t begin, int64_t end,
                                 float* planes))
LW_DECLARE(void grad_values_filters(const float* planes, const float* grad, const GradValuesJob& job,
                                    int64_t begin, int64_t end, bool add, float* out))

namespace liveweight::LW_ISA {

void grad_values_fill(const float* x, const GradValuesJob& job, int64_t begin, int64_t end, float* planes) {
  const int64_t size = job.picture.height * job.picture.width;
  for (int64_t c = begin; c < end; ++c) {
    fill_planes(x + c * size, job.picture, job.planes, planes + c * job.planes.size);
  }
}

// out[t] (+)= sum over the plane of grad[r, c] * plane[taps[t] + r * row_step + c]. Lanes past a row's
// end are zero on both sides: no inf or NaN from beyond it can enter.
template <int kTaps>
void dot_planes(const float* grad, const float* plane, const int64_t* taps, int64_t height, int64_t width,
                int64_t row_step, bool add, float* out) {
  Vec sum[kTaps];
  for (int t = 0; t < kTaps; ++t) sum[t] = zero();
  for (int64_t r = 0; r < height; ++r, grad += width, plane += row_step) {
    int64_t c = 0;
    for (; c + kLanes <= width; c += kLanes) {
      const Vec g = load(grad + c);
#pragma GCC unroll 9
      for (int t = 0; t < kTaps; ++t) sum[t] = fma(g, load(plane + taps[t] + c), sum[t]);
    }
    if (c == width) continue;
    const Mask some = first(int(width - c));
    const Vec g = load(grad + c, some);
#pragma GCC unroll 9
    for (int t = 0; t < kTaps; ++t) sum[t] = fma(g, load(plane + taps[t] + c, some), sum[t]);
  }
  for (int t = 0; t < kTaps; ++t) out[t] = reduce_add(sum[t]) + (add ? out[t] : 0.0f);
}

void grad_values_filters(const float* planes, const float* grad, const GradValuesJob& job, int64_t begin,
                         int64_t end, bool add, float* out) {
  for (int64_t o = begin; o < end; ++o) {
    const float* g = grad + o * job.height * job.width;
    const int64_t group = o / job.group_filters * job.group_channels;
    for (int32_t i = job.offsets[o]; i < job.offsets[o + 1]; ++i) {
      const float* plane = planes + (group + job.channels[i]) * job.planes.size;
      float* to = out + i * job.kernel_size;
      for (int64_t t = 0; t < job.kernel_size;) {
        const int64_t left = job.kernel_size - t;
        const int count = left >= 9 ? 9 : left >= 5 ? 5 : left >= 3 ? 3 : 1;
        auto run = count == 9 ? dot_planes<9> : count == 5 ? dot_planes<5> : count == 3 ? dot_planes<3> : dot_planes<1>;
        run(g, plane, job.taps + t, job.height, job.width, job.planes.width, add, to + t);
        t += count;
      }
    }
  }
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {
namespace {

// Offset of each tap in the planes of a channel.
std::vector<int64_t> tap_offsets(const ConvSizes& s, const TapPlan& plan, int64_t height, int64_t width) {
  std::vector<int64_t> offsets;
  for (int64_t i = 0; i < s.kernel[0]; ++i) {
    for (int64_t j = 0; j < s.kernel[1]; ++j) {
      const int64_t row = i * s.dilation[0], column = j * s.dilation[1];
      int64_t phase = 0;
      while (plan.phases[size_t(phase)].row != row % s.stride[0] ||
             plan.phases[size_t(phase)].column != column % s.stride[1]) {
        ++phase;
      }
      offsets.push_back((phase * height + row / s.stride[0]) * width + column / s.stride[1]);
    }
  }
  return offsets;
}

struct GradValues {
  ConvSizes sizes;
  GradValuesJob job;
  const float *grad, *x;
  float* out;

  // Adds samples [first, first + count).
  void add(int64_t first, int64_t count, int64_t threads, float* planes) const {
    const ConvSizes& s = sizes;
    const int64_t rows = count * s.C;
    parallel_for(rows, (rows + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      LW_SELECT(grad_values_fill)(x + first * s.C * s.H * s.W, job, begin, end, planes);
    });
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      const int64_t from = share_kernels(job.offsets, s.filters, begin, threads);
      const int64_t to = share_kernels(job.offsets, s.filters, end, threads);
      for (int64_t b = 0; b < count; ++b) {
        LW_SELECT(grad_values_filters)(planes + b * s.C * job.planes.size,
                                       grad + (first + b) * s.filters * s.height * s.width, job, from,
                                       to, first + b > 0, out);
      }
    });
  }
};

Tensor kernelwise_conv2d_grad_values(const Tensor& grad, const Tensor& x, const Tensor& filter_offsets,
                                     const Tensor& channels, std::vector<int64_t> kernel_size,
                                     std::vector<int64_t> stride, std::vector<int64_t> padding,
                                     std::vector<int64_t> dilation, int64_t groups) {
  const char* op = "kernelwise_conv2d_grad_values";
  GradValues task{};
  task.x = checked_data<float>(op, "x", x, 4, ScalarType::Float);
  const ConvSizes s = task.sizes =
      conv_sizes(op, {x.size(0), x.size(1), x.size(2), x.size(3)}, filter_offsets.numel() - 1,
                 kernel_size, stride, padding, dilation, groups);
  const KeptKernels kept = check_kept(op, filter_offsets, channels, s.C / groups);
  task.grad = check_grad(op, grad, s);
  Tensor out = torch::stable::new_zeros(x, {kept.count, s.kernel[0], s.kernel[1]});
  task.out = static_cast<float*>(out.mutable_data_ptr());
  if (s.B == 0 || kept.count == 0) return out;
  const TapPlan plan = plan_taps(s);
  const int64_t height = s.height + plan.reach[0], width = s.width + plan.reach[1];
  const int64_t phases = int64_t(plan.phases.size());
  const int64_t size = (phases * height * width + 15) / 16 * 16;
  const std::vector<int64_t> taps = tap_offsets(s, plan, height, width);
  task.job = {picture_of(s), {height, width, size, plan.phases.data(), phases}, taps.data(),
              int64_t(taps.size()), s.height, s.width, s.C / groups,
              std::max<int64_t>(s.filters / groups, 1), kept.offsets, kept.channels};
  // Samples whose planes live at a time: 32 MB of them, whatever the threads.
  const int64_t floats = s.C * size;
  const int64_t together = std::clamp<int64_t>((8 << 20) / floats, 1, s.B);
  Workspace<float> planes(together * floats + kSlack);
  for (int64_t first = 0; first < s.B; first += together) {
    task.add(first, std::min(together, s.B - first), threads_for(s, kept.count), planes.data());
  }
  return out;
}

}  // namespace
}  // namespace liveweight

STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) {
  m.impl("kernelwise_conv2d_grad_values", TORCH_BOX(&liveweight::kernelwise_conv2d_grad_values));
}
#endif  // LW_BASE
