// Gradients of a convolution whose weight lacks whole kernels, at sparse cost.
//
// To x: the same engine as forward. Output gradients become planes with a margin as wide as the
// kernel reaches, the pattern is transposed (by input channel), and each phase of x is one sweep over
// the taps that read it. To values: each kept kernel is a handful of dot products of two planes.
// Every number has one owner, which adds in an order that does not depend on threads.
#include "conv2d.h"

namespace liveweight {

struct GradXJob {
  Picture grad;       // one output gradient, its margins as padding
  PlaneShape planes;  // one phase
  Picture x;
  const Phase* phases;
  const Sweep* sweeps;  // one for each phase of the stride; no runs: no tap reads it
  int64_t phase_count;
  const float* values;
  const int32_t* offsets;  // by input channel: the kept kernels that read it,
  const int32_t* filters;  // their filter
  const int32_t* order;    // and their place in values
  int32_t kernel_size;
  int64_t band, scratch_step;
};

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

LW_DECLARE(void grad_x_fill(const float* grad, const GradXJob& job, int64_t begin, int64_t end, float* planes))
LW_DECLARE(void grad_x_channels(const float* planes, const GradXJob& job, int64_t begin, int64_t end,
                                float* scratch, float* x))
LW_DECLARE(void grad_values_fill(const float* x, const GradValuesJob& job, int64_t begin, int64_t end,
                                 float* planes))
LW_DECLARE(void grad_values_filters(const float* planes, const float* grad, const GradValuesJob& job,
                                    int64_t begin, int64_t end, bool add, float* out))

namespace liveweight::LW_ISA {

void grad_x_fill(const float* grad, const GradXJob& job, int64_t begin, int64_t end, float* planes) {
  const int64_t size = job.grad.height * job.grad.width;
  for (int64_t o = begin; o < end; ++o) {
    fill_planes(grad + o * size, job.grad, job.planes, planes + o * job.planes.size);
  }
}

// Rows [from, from + rows) and columns of one phase of x, taken from scratch.
LW_INLINE void scatter_rows(const float* in, int64_t in_step, const Picture& x, Phase phase, int64_t from,
                            int64_t rows, int64_t left, int64_t columns, float* out) {
  const int64_t step = x.stride[1];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t y = (from + r) * x.stride[0] + phase.row - x.padding[0];
    float* to = out + y * x.width + left * step + phase.column - x.padding[1];
    const float* row = in + r * in_step;
    if (step == 1) {
      copy_row(row, 1, to, columns);
    } else {
      for (int64_t c = 0; c < columns; ++c) to[c * step] = row[c];
    }
  }
}

void grad_x_channels(const float* planes, const GradXJob& job, int64_t begin, int64_t end,
                     float* scratch, float* x) {
  for (int64_t c = begin; c < end; ++c) {
    const int32_t first = job.offsets[c];
    const KernelList kernels{job.values, job.filters + first, job.order + first,
                             job.offsets[c + 1] - first, job.kernel_size};
    float* out = x + c * job.x.height * job.x.width;
    for (int64_t i = 0; i < job.phase_count; ++i) {
      const Phase at = job.phases[i];
      const int64_t top = first_index(0, job.x.stride[0], at.row, job.x.padding[0]);
      const int64_t bottom = first_index(job.x.height, job.x.stride[0], at.row, job.x.padding[0]);
      const int64_t left = first_index(0, job.x.stride[1], at.column, job.x.padding[1]);
      const int64_t right = first_index(job.x.width, job.x.stride[1], at.column, job.x.padding[1]);
      if (right <= left) continue;
      for (int64_t r = top; r < bottom; r += job.band) {
        const int64_t rows = bottom - r < job.band ? bottom - r : job.band;
        convolve(planes + r * job.planes.width + left, kernels, job.sweeps[i], rows, right - left, scratch,
                 job.scratch_step);
        scatter_rows(scratch, job.scratch_step, job.x, at, r, rows, left, right - left, out);
      }
    }
  }
}

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

int64_t pick_threads(const ConvSizes& s, int64_t kept) {
  const double macs = double(s.B) * double(kept) * double(s.kernel[0] * s.kernel[1]) *
                      double(s.height * s.width);
  return macs < kParallelMacs ? 1 : int64_t(torch::stable::get_num_threads());
}

// The kept kernels by the channel of x that they read, in the order of filters, by counting.
struct ByChannel {
  std::vector<int32_t> offsets, filters, order;

  ByChannel(const ConvSizes& s, const KeptKernels& kept)
      : offsets(size_t(s.C) + 2), filters(size_t(kept.count)), order(size_t(kept.count)) {
    const int64_t group_channels = s.C / s.groups;
    const int64_t group_filters = std::max<int64_t>(s.filters / s.groups, 1);
    const auto source = [&](int64_t o, int32_t i) {
      return size_t(o / group_filters * group_channels + kept.channels[i]);
    };
    for (int64_t o = 0; o < s.filters; ++o) {
      for (int32_t i = kept.offsets[o]; i < kept.offsets[o + 1]; ++i) ++offsets[source(o, i) + 2];
    }
    for (size_t c = 2; c < offsets.size(); ++c) offsets[c] += offsets[c - 1];
    for (int64_t o = 0; o < s.filters; ++o) {
      for (int32_t i = kept.offsets[o]; i < kept.offsets[o + 1]; ++i) {
        const size_t at = size_t(offsets[source(o, i) + 1]++);
        filters[at] = int32_t(o);
        order[at] = i;
      }
    }
  }
};

struct GradX {
  ConvSizes sizes;
  GradXJob job;
  const float* grad;
  float* x;

  void run(int64_t threads) const {
    const int64_t grad_size = sizes.filters * sizes.height * sizes.width;
    const int64_t x_size = sizes.C * sizes.H * sizes.W, floats = sizes.filters * job.planes.size;
    const bool by_sample = threads == 1 || sizes.B % threads == 0 || sizes.B >= 8 * threads;
    const int64_t together = by_sample ? 1 : sizes.B;  // samples whose planes live at a time
    const int64_t workers = by_sample ? threads : 1;
    parallel_for(sizes.B, (sizes.B + workers - 1) / workers, [&](int64_t begin, int64_t end) {
      Workspace<float> planes(together * floats + kSlack);
      std::fill_n(planes.data() + together * floats, kSlack, 0.0f);
      for (int64_t b = begin; b < end; b += together) {
        LW_SELECT(grad_x_fill)(grad + b * grad_size, job, 0, together * sizes.filters, planes.data());
        parallel_for(by_sample ? 1 : threads, 1, [&](int64_t part, int64_t last) {
          const int64_t parts = by_sample ? 1 : threads;
          Workspace<float> scratch(job.band * job.scratch_step + kSlack);
          const int64_t from = share_kernels(job.offsets, sizes.C, part, parts);
          const int64_t to = share_kernels(job.offsets, sizes.C, last, parts);
          for (int64_t i = 0; i < together; ++i) {
            LW_SELECT(grad_x_channels)(planes.data() + i * floats, job, from, to, scratch.data(),
                                       x + (b + i) * x_size);
          }
        });
      }
    });
  }
};

Tensor kernelwise_conv2d_grad_x(const Tensor& grad, const Tensor& values, const Tensor& filter_offsets,
                                const Tensor& channels, std::vector<int64_t> x_shape,
                                std::vector<int64_t> stride, std::vector<int64_t> padding,
                                std::vector<int64_t> dilation, int64_t groups) {
  const char* op = "kernelwise_conv2d_grad_x";
  GradX task{};
  task.grad = checked_data<float>(op, "grad", grad, 4, ScalarType::Float);
  GradXJob& job = task.job;
  job.values = checked_data<float>(op, "values", values, 3, ScalarType::Float);
  const ConvSizes s = task.sizes = conv_sizes(op, x_shape, filter_offsets.numel() - 1,
                                              {values.size(1), values.size(2)}, stride, padding, dilation, groups);
  const KeptKernels kept = check_kept(op, filter_offsets, channels, s.C / groups);
  LW_CHECK(values.size(0) == kept.count, op, ": expected ", kept.count, " kernels, got ", values.size(0));
  LW_CHECK(grad.size(0) == s.B && grad.size(1) == s.filters && grad.size(2) == s.height &&
               grad.size(3) == s.width,
           op, ": expected grad [", s.B, ", ", s.filters, ", ", s.height, ", ", s.width, "], got ",
           shape_of(grad));
  Tensor x = torch::stable::new_empty(grad, x_shape);
  task.x = static_cast<float*>(x.mutable_data_ptr());
  if (x.numel() == 0) return x;
  TapPlan plan = plan_taps(s);
  const int64_t rows = (s.H - 1 + s.padding[0]) / s.stride[0] + 1;  // of phase 0, the longest
  const int64_t columns = (s.W - 1 + s.padding[1]) / s.stride[1] + 1;
  const int64_t height = plan.reach[0] + std::max(rows, s.height);
  const int64_t width = round_width(plan.reach[1] + std::max(columns, s.width));
  plan_runs(s, height, width, true, false, plan);
  const Phase whole{0, 0};
  const int64_t size = (height * width + 15) / 16 * 16;
  job.grad = {s.height, s.width, {1, 1}, {plan.reach[0], plan.reach[1]}};
  job.planes = {height, width, size, &whole, 1};
  job.x = {s.H, s.W, {s.stride[0], s.stride[1]}, {s.padding[0], s.padding[1]}};
  std::vector<Phase> phases;
  std::vector<Sweep> sweeps;
  for (int64_t a = 0; a < s.stride[0]; ++a) {
    for (int64_t b = 0; b < s.stride[1]; ++b) {
      phases.push_back({a, b});
      sweeps.push_back({plan.runs.data(), 0, size, width, false});
      for (size_t i = 0; i < plan.phases.size(); ++i) {
        if (plan.phases[i].row != a || plan.phases[i].column != b) continue;
        sweeps.back().runs += plan.phase_begin[i];
        sweeps.back().run_count = plan.phase_begin[i + 1] - plan.phase_begin[i];
      }
    }
  }
  job.phases = phases.data();
  job.sweeps = sweeps.data();
  job.phase_count = int64_t(phases.size());
  const ByChannel turned(s, kept);
  job.offsets = turned.offsets.data();
  job.filters = turned.filters.data();
  job.order = turned.order.data();
  job.kernel_size = int32_t(s.kernel[0] * s.kernel[1]);
  job.scratch_step = (columns + 15) / 16 * 16;
  job.band = pick_band(rows, s.filters * width, job.scratch_step, 1);
  task.run(pick_threads(s, kept.count));
  return x;
}

Tensor kernelwise_conv2d_grad_values(const Tensor& grad, const Tensor& x, const Tensor& filter_offsets,
                                     const Tensor& channels, std::vector<int64_t> kernel_size,
                                     std::vector<int64_t> stride, std::vector<int64_t> padding,
                                     std::vector<int64_t> dilation, int64_t groups) {
  const char* op = "kernelwise_conv2d_grad_values";
  const float* x_data = checked_data<float>(op, "x", x, 4, ScalarType::Float);
  const float* grad_data = checked_data<float>(op, "grad", grad, 4, ScalarType::Float);
  const ConvSizes s =
      conv_sizes(op, {x.size(0), x.size(1), x.size(2), x.size(3)}, filter_offsets.numel() - 1,
                 kernel_size, stride, padding, dilation, groups);
  const KeptKernels kept = check_kept(op, filter_offsets, channels, s.C / groups);
  LW_CHECK(grad.size(0) == s.B && grad.size(1) == s.filters && grad.size(2) == s.height &&
               grad.size(3) == s.width,
           op, ": expected grad [", s.B, ", ", s.filters, ", ", s.height, ", ", s.width, "], got ",
           shape_of(grad));
  Tensor out = torch::stable::new_zeros(x, {kept.count, s.kernel[0], s.kernel[1]});
  if (s.B == 0 || kept.count == 0) return out;
  TapPlan plan = plan_taps(s);
  const int64_t height = s.height + plan.reach[0], width = s.width + plan.reach[1];
  std::vector<int64_t> taps;
  for (int64_t i = 0; i < s.kernel[0]; ++i) {
    for (int64_t j = 0; j < s.kernel[1]; ++j) {
      const int64_t row = i * s.dilation[0], column = j * s.dilation[1];
      int64_t phase = 0;
      while (plan.phases[size_t(phase)].row != row % s.stride[0] ||
             plan.phases[size_t(phase)].column != column % s.stride[1]) {
        ++phase;
      }
      taps.push_back((phase * height + row / s.stride[0]) * width + column / s.stride[1]);
    }
  }
  const int64_t phases = int64_t(plan.phases.size());
  GradValuesJob job{};
  job.picture = {s.H, s.W, {s.stride[0], s.stride[1]}, {s.padding[0], s.padding[1]}};
  job.planes = {height, width, (phases * height * width + 15) / 16 * 16, plan.phases.data(), phases};
  job.taps = taps.data();
  job.kernel_size = int64_t(taps.size());
  job.height = s.height;
  job.width = s.width;
  job.group_channels = s.C / groups;
  job.group_filters = std::max<int64_t>(s.filters / groups, 1);
  job.offsets = kept.offsets;
  job.channels = kept.channels;
  float* out_data = static_cast<float*>(out.mutable_data_ptr());
  const int64_t threads = pick_threads(s, kept.count);
  // Samples whose planes live at a time: 32 MB of them, whatever the threads.
  const int64_t floats = s.C * job.planes.size;
  const int64_t together = std::clamp<int64_t>((8 << 20) / std::max<int64_t>(floats, 1), 1, s.B);
  Workspace<float> planes(together * floats + kSlack);
  for (int64_t b0 = 0; b0 < s.B; b0 += together) {
    const int64_t samples = std::min(together, s.B - b0), rows = samples * s.C;
    parallel_for(rows, (rows + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      LW_SELECT(grad_values_fill)(x_data + b0 * s.C * s.H * s.W, job, begin, end, planes.data());
    });
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      const int64_t from = share_kernels(kept.offsets, s.filters, begin, threads);
      const int64_t to = share_kernels(kept.offsets, s.filters, end, threads);
      for (int64_t b = 0; b < samples; ++b) {
        const float* g = grad_data + (b0 + b) * s.filters * s.height * s.width;
        LW_SELECT(grad_values_filters)(planes.data() + b * floats, g, job, from, to, b0 + b > 0, out_data);
      }
    });
  }
  return out;
}

}  // namespace
}  // namespace liveweight

STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) {
  m.impl("kernelwise_conv2d_grad_x", TORCH_BOX(&liveweight::kernelwise_conv2d_grad_x));
  m.impl("kernelwise_conv2d_grad_values", TORCH_BOX(&liveweight::kernelwise_conv2d_grad_values));
}
#endif  // LW_BASE
