// y = pool(act(conv2d(x, W) + b)) where whole 2-D kernels of W are missing.
//
// Direct: padded planes (planes.h), then for each filter its kept kernels over tiles of 8 rows held in
// registers. Bias, activation and pool are applied while the filter's output is in the first-level
// cache. The order of a sum never depends on threads.
#include "conv2d.h"
#include "layout.h"

namespace liveweight {

struct ConvJob {
  Picture picture;
  PlaneShape planes;
  Sweep sweep;
  int64_t group_channels, group_filters;
  const float* values;
  const int32_t* offsets;
  const int32_t* channels;
  int32_t kernel_size;
  const float* bias;
  bool relu;
  int64_t pool, rows, columns, band;  // rows: those that a pool uses
  int64_t scratch_step;               // floats between output rows before the epilogue
};

}  // namespace liveweight

LW_DECLARE(void conv_fill(const float* x, const ConvJob& job, int64_t count, float* planes))
LW_DECLARE(void conv_gather(const float* x, Layout layout, int64_t batch, int64_t channels, int64_t pixels,
                            int64_t begin, int64_t end, float* out))
LW_DECLARE(void conv_scatter(const float* in, Layout layout, int64_t batch, int64_t channels, int64_t pixels,
                             int64_t begin, int64_t end, float* y))
LW_DECLARE(void conv_filters(const float* planes, const ConvJob& job, int64_t begin, int64_t end,
                             float* scratch, float* y))

namespace liveweight::LW_ISA {

void conv_fill(const float* x, const ConvJob& job, int64_t count, float* planes) {
  const int64_t size = job.picture.height * job.picture.width;
  for (int64_t c = 0; c < count; ++c) {
    fill_planes(x + c * size, job.picture, job.planes, planes + c * job.planes.size);
  }
}

// Channels [begin, end) of a sample that x points to, as contiguous planes.
void conv_gather(const float* x, Layout layout, int64_t batch, int64_t channels, int64_t pixels,
                 int64_t begin, int64_t end, float* out) {
  if (layout == Layout::channels_last) {
    return transpose_rows(x + begin, channels, out, pixels, pixels, end - begin);
  }
  for (int64_t i = begin * pixels; i < end * pixels; ++i) *out++ = x[i * batch];
}

// The reverse: contiguous planes of channels [begin, end) to the sample that y points to.
void conv_scatter(const float* in, Layout layout, int64_t batch, int64_t channels, int64_t pixels,
                  int64_t begin, int64_t end, float* y) {
  if (layout == Layout::channels_last) {
    return transpose_rows(in, pixels, y + begin, channels, end - begin, pixels);
  }
  for (int64_t i = begin * pixels; i < end * pixels; ++i) y[i * batch] = *in++;
}

LW_INLINE void fill_row(float* out, float value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = value;
}

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

// y is where filter `begin` goes.
void conv_filters(const float* planes, const ConvJob& job, int64_t begin, int64_t end, float* scratch,
                  float* y) {
  const int64_t out_rows = job.rows / job.pool, out_columns = job.columns / job.pool;
  for (int64_t r0 = 0; r0 < job.rows; r0 += job.band) {
    const int64_t rows = job.rows - r0 < job.band ? job.rows - r0 : job.band;
    for (int64_t o = begin; o < end; ++o) {
      const int32_t first = job.offsets[o];
      const KernelList kernels{job.values + int64_t(first) * job.kernel_size, job.channels + first,
                               nullptr, job.offsets[o + 1] - first, job.kernel_size};
      const float bias = job.bias ? job.bias[o] : 0.0f;
      float* to = y + ((o - begin) * out_rows + r0 / job.pool) * out_columns;
      if (kernels.count == 0) {
        fill_row(to, job.relu && bias < 0.0f ? 0.0f : bias, rows / job.pool * out_columns);
        continue;
      }
      const int64_t group = o / job.group_filters * job.group_channels;
      convolve(planes + group * job.planes.size + r0 * job.planes.width, kernels, job.sweep, rows,
               job.columns, scratch, job.scratch_step);
      if (job.pool == 1) {
        finish_rows(scratch, job.scratch_step, rows, job.columns, bias, job.relu, to);
      } else {
        finish_pool(scratch, job.scratch_step, rows, job.columns, job.pool, bias, job.relu, to);
      }
    }
  }
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {
namespace {

struct Conv {
  ConvSizes sizes;
  ConvJob job;
  const float* x;
  Layout x_layout;
  float* y;
  Layout y_layout;

  int64_t out_pixels() const { return (job.rows / job.pool) * (job.columns / job.pool); }

  // Channels [begin, end) of a sample to planes; `planes` is where channel 0 goes.
  void fill(int64_t sample, int64_t begin, int64_t end, float* planes, float* turned) const {
    const ConvSizes& s = sizes;
    const int64_t pixels = s.H * s.W;
    const float* from = x + (x_layout == Layout::batch_last ? sample : sample * s.C * pixels);
    if (x_layout == Layout::contiguous) {
      return LW_SELECT(conv_fill)(from + begin * pixels, job, end - begin, planes + begin * job.planes.size);
    }
    LW_SELECT(conv_gather)(from, x_layout, s.B, s.C, pixels, begin, end, turned);
    LW_SELECT(conv_fill)(turned, job, end - begin, planes + begin * job.planes.size);
  }

  void filters(int64_t sample, int64_t begin, int64_t end, const float* planes, float* scratch,
               float* turned) const {
    const int64_t pixels = out_pixels(), count = sizes.filters * pixels;
    if (y_layout == Layout::contiguous) {
      return LW_SELECT(conv_filters)(planes, job, begin, end, scratch, y + sample * count + begin * pixels);
    }
    LW_SELECT(conv_filters)(planes, job, begin, end, scratch, turned);
    float* to = y + (y_layout == Layout::batch_last ? sample : sample * count);
    LW_SELECT(conv_scatter)(turned, y_layout, sizes.B, sizes.filters, pixels, begin, end, to);
  }

  // Floats of a sample's channels or filters on their way from or to another layout.
  int64_t turned_floats() const {
    const int64_t in = x_layout == Layout::contiguous ? 0 : sizes.C * sizes.H * sizes.W;
    return std::max(in, y_layout == Layout::contiguous ? 0 : sizes.filters * out_pixels());
  }

  int64_t scratch_floats() const { return job.band * job.scratch_step + kSlack; }

  // Each worker pads and convolves samples of its own.
  void run_by_sample(int64_t threads) const {
    parallel_for(sizes.B, (sizes.B + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      const int64_t floats = sizes.C * job.planes.size;
      Workspace<float> planes(floats + kSlack), scratch(scratch_floats()), turned(turned_floats());
      std::fill_n(planes.data() + floats, kSlack, 0.0f);
      for (int64_t b = begin; b < end; ++b) {
        fill(b, 0, sizes.C, planes.data(), turned.data());
        filters(b, 0, sizes.filters, planes.data(), scratch.data(), turned.data());
      }
    });
  }

  // The few samples are padded together; then each worker takes a share of the filters.
  void run_by_filter(int64_t threads) const {
    const int64_t floats = sizes.C * job.planes.size;
    Workspace<float> planes(sizes.B * floats + kSlack);
    std::fill_n(planes.data() + sizes.B * floats, kSlack, 0.0f);
    parallel_for(sizes.C, (sizes.C + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      Workspace<float> turned(turned_floats());
      for (int64_t b = 0; b < sizes.B; ++b) fill(b, begin, end, planes.data() + b * floats, turned.data());
    });
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      Workspace<float> scratch(scratch_floats()), turned(turned_floats());
      const int64_t from = share_kernels(job.offsets, sizes.filters, begin, threads);
      const int64_t to = share_kernels(job.offsets, sizes.filters, end, threads);
      for (int64_t b = 0; b < sizes.B; ++b) {
        filters(b, from, to, planes.data() + b * floats, scratch.data(), turned.data());
      }
    });
  }

  void run(int64_t kept) const {
    if (sizes.B == 0 || sizes.filters == 0) return;
    const int64_t threads = threads_for(sizes, kept);
    if (split_samples(sizes, threads)) run_by_sample(threads);
    else run_by_filter(threads);
  }
};

// Fills in everything about the job that sizes and taps decide; the job points into the plan.
void plan_job(const ConvSizes& s, int64_t pool, TapPlan& plan, ConvJob& job) {
  const int64_t height = s.height + plan.reach[0], exact = s.width + plan.reach[1];
  const int64_t phases = int64_t(plan.phases.size());
  job.rows = s.height / pool * pool;
  job.columns = s.width;
  job.pool = pool;
  const bool flat = prefer_flat(job.rows, s.width, exact, s.kernel[0] * s.kernel[1] == 1);
  const int64_t width = flat ? exact : round_width(exact);
  const int64_t size = (phases * height * width + 15) / 16 * 16;
  plan_runs(s, height, width, false, flat, plan);
  job.picture = picture_of(s);
  job.planes = {height, width, size, plan.phases.data(), phases};
  job.sweep = {plan.runs.data(), int64_t(plan.runs.size()), size, width, flat};
  job.group_channels = s.C / s.groups;
  job.group_filters = std::max<int64_t>(s.filters / s.groups, 1);
  job.kernel_size = int32_t(s.kernel[0] * s.kernel[1]);
  job.scratch_step = flat ? width : (s.width + 15) / 16 * 16;
  job.band = pick_band(job.rows, s.C * phases * width, job.scratch_step, pool);
}

Tensor kernelwise_conv2d(const Tensor& x, const Tensor& values, const Tensor& filter_offsets,
                         const Tensor& channels, const std::optional<Tensor>& bias,
                         std::vector<int64_t> stride, std::vector<int64_t> padding,
                         std::vector<int64_t> dilation, int64_t groups, bool relu, int64_t pool, int64_t layout) {
  const char* op = "kernelwise_conv2d";
  Conv conv{};
  ConvJob& job = conv.job;
  conv.x = checked_picture(op, "x", x, conv.x_layout);
  LW_CHECK(layout >= 0 && layout <= 2, op, ": layout must be 0, 1 or 2, got ", layout);
  conv.y_layout = Layout(layout);
  job.values = checked_data<float>(op, "values", values, 3, ScalarType::Float);
  const ConvSizes s = conv.sizes =
      conv_sizes(op, {x.size(0), x.size(1), x.size(2), x.size(3)}, filter_offsets.numel() - 1,
                 {values.size(1), values.size(2)}, stride, padding, dilation, groups);
  const KeptKernels kept = check_kept(op, filter_offsets, channels, s.C / groups);
  LW_CHECK(values.size(0) == kept.count, op, ": expected ", kept.count, " kernels, got ", values.size(0));
  LW_CHECK(pool >= 1 && pool <= std::min(s.height, s.width), op, ": cannot pool ", s.height, " x ",
           s.width, " by ", pool);
  if (bias) {
    job.bias = checked_data<float>(op, "bias", *bias, 1, ScalarType::Float);
    LW_CHECK(bias->numel() == s.filters, op, ": expected bias [", s.filters, "], got ", shape_of(*bias));
  }
  job.offsets = kept.offsets;
  job.channels = kept.channels;
  job.relu = relu;
  TapPlan plan = plan_taps(s);
  plan_job(s, pool, plan, job);
  Tensor y = new_picture(x, {s.B, s.filters, s.height / pool, s.width / pool}, conv.y_layout);
  conv.y = static_cast<float*>(y.mutable_data_ptr());
  conv.run(kept.count);
  return y;
}

}  // namespace
}  // namespace liveweight

STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) {
  m.impl("kernelwise_conv2d", TORCH_BOX(&liveweight::kernelwise_conv2d));
}
#endif  // LW_BASE
