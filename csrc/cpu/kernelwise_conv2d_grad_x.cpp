// Gradient of a convolution to x where whole kernels of the weight are missing, at sparse cost.
//
// The same engine as forward: output gradients become planes with a margin as wide as the kernel
// reaches, the pattern is transposed (by input channel), and each phase of x is one sweep over the
// taps that read it. Each number has one owner, whose order of adding does not depend on threads.
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

}  // namespace liveweight

LW_DECLARE(void grad_x_fill(const float* grad, const GradXJob& job, int64_t begin, int64_t end, float* planes))
LW_DECLARE(void grad_x_channels(const float* planes, const GradXJob& job, int64_t begin, int64_t end,
                                float* scratch, float* x))

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

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {
namespace {

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
    const bool by_sample = split_samples(sizes, threads);
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

// Fills in what sizes and taps decide; the job points into the plan, the sweeps and the phases.
struct GradXPlan {
  TapPlan taps;
  std::vector<Phase> phases;
  std::vector<Sweep> sweeps;
  Phase whole{0, 0};

  GradXPlan(const ConvSizes& s, GradXJob& job) : taps(plan_taps(s)) {
    const int64_t rows = (s.H - 1 + s.padding[0]) / s.stride[0] + 1;  // of phase 0, the longest
    const int64_t columns = (s.W - 1 + s.padding[1]) / s.stride[1] + 1;
    const int64_t height = taps.reach[0] + std::max(rows, s.height);
    const int64_t width = round_width(taps.reach[1] + std::max(columns, s.width));
    const int64_t size = (height * width + 15) / 16 * 16;
    plan_runs(s, height, width, true, false, taps);
    for (int64_t a = 0; a < s.stride[0]; ++a) {
      for (int64_t b = 0; b < s.stride[1]; ++b) add_phase({a, b}, size, width);
    }
    job.grad = {s.height, s.width, {1, 1}, {taps.reach[0], taps.reach[1]}};
    job.planes = {height, width, size, &whole, 1};
    job.x = picture_of(s);
    job.phases = phases.data();
    job.sweeps = sweeps.data();
    job.phase_count = int64_t(phases.size());
    job.kernel_size = int32_t(s.kernel[0] * s.kernel[1]);
    job.scratch_step = (columns + 15) / 16 * 16;
    job.band = pick_band(rows, s.filters * width, job.scratch_step, 1);
  }

  void add_phase(Phase phase, int64_t size, int64_t width) {
    Sweep sweep{taps.runs.data(), 0, size, width, false};
    for (size_t i = 0; i < taps.phases.size(); ++i) {
      if (taps.phases[i].row != phase.row || taps.phases[i].column != phase.column) continue;
      sweep.runs += taps.phase_begin[i];
      sweep.run_count = taps.phase_begin[i + 1] - taps.phase_begin[i];
    }
    phases.push_back(phase);
    sweeps.push_back(sweep);
  }
};

Tensor kernelwise_conv2d_grad_x(const Tensor& grad, const Tensor& values, const Tensor& filter_offsets,
                                const Tensor& channels, std::vector<int64_t> x_shape,
                                std::vector<int64_t> stride, std::vector<int64_t> padding,
                                std::vector<int64_t> dilation, int64_t groups) {
  const char* op = "kernelwise_conv2d_grad_x";
  GradX task{};
  GradXJob& job = task.job;
  job.values = checked_data<float>(op, "values", values, 3, ScalarType::Float);
  const ConvSizes s = task.sizes =
      conv_sizes(op, x_shape, filter_offsets.numel() - 1, {values.size(1), values.size(2)}, stride,
                 padding, dilation, groups);
  const KeptKernels kept = check_kept(op, filter_offsets, channels, s.C / groups);
  LW_CHECK(values.size(0) == kept.count, op, ": expected ", kept.count, " kernels, got ", values.size(0));
  task.grad = check_grad(op, grad, s);
  Tensor x = torch::stable::new_empty(grad, x_shape);
  task.x = static_cast<float*>(x.mutable_data_ptr());
  if (x.numel() == 0) return x;
  const GradXPlan plan(s, job);
  const ByChannel turned(s, kept);
  job.offsets = turned.offsets.data();
  job.filters = turned.filters.data();
  job.order = turned.order.data();
  task.run(threads_for(s, kept.count));
  return x;
}

}  // namespace
}  // namespace liveweight

STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) {
  m.impl("kernelwise_conv2d_grad_x", TORCH_BOX(&liveweight::kernelwise_conv2d_grad_x));
}
#endif  // LW_BASE
