// kernelwise_conv2d, one sample at a time: any kernel, stride, padding and dilation.
//
// For each filter its kept kernels, over tiles of rows held in registers: straight from the sample for
// the common 3 x 3 kernels (rows.h), else from padded planes (planes.h). Bias, activation and pool are
// applied while the filter's output is in the first-level cache. The order of a sum never depends on
// threads.
#include "kernelwise_conv2d.h"
#include "rows.h"

namespace liveweight {

struct ConvJob {
  KeptFilters filters;
  Picture picture;
  PlaneShape planes;
  Sweep sweep;
  RowsShape shape;
  bool direct;  // read the sample itself (rows.h) instead of padded planes
  int32_t kernel_size;
  int64_t rows, columns, band;  // rows: those that a pool uses
  int64_t scratch_step;         // floats between output rows before the epilogue
};

}  // namespace liveweight

LW_DECLARE(void conv_fill(const float* x, const ConvJob& job, int64_t count, float* planes))
LW_DECLARE(void conv_gather(const float* x, Layout layout, int64_t batch, int64_t channels, int64_t pixels,
                            int64_t begin, int64_t end, float* out))
LW_DECLARE(void conv_scatter(const float* in, Layout layout, int64_t batch, int64_t channels, int64_t pixels,
                             int64_t begin, int64_t end, float* y))
LW_DECLARE(void conv_filters(const float* planes, const ConvJob& job, const int32_t* order, int64_t count,
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

// Filters order[0 .. count), y is where filter 0 goes.
void conv_filters(const float* planes, const ConvJob& job, const int32_t* order, int64_t count,
                  float* scratch, float* y) {
  const KeptFilters& filters = job.filters;
  const int64_t pool = filters.pool, out_rows = job.rows / pool, out_columns = job.columns / pool;
  for (int64_t r0 = 0; r0 < job.rows; r0 += job.band) {
    const int64_t rows = job.rows - r0 < job.band ? job.rows - r0 : job.band;
    for (int64_t n = 0; n < count; ++n) {
      const int64_t o = order[n];
      const int32_t first = filters.offsets[o];
      const KernelList kernels{filters.values + int64_t(first) * job.kernel_size, filters.channels + first,
                               nullptr, filters.offsets[o + 1] - first, job.kernel_size};
      const float bias = filters.bias ? filters.bias[o] : 0.0f;
      float* to = y + (o * out_rows + r0 / pool) * out_columns;
      if (kernels.count == 0) {
        fill_row(to, filters.relu && bias < 0.0f ? 0.0f : bias, rows / pool * out_columns);
        continue;
      }
      const float* plane = planes + o / filters.group_filters * filters.group_channels * job.planes.size;
      if (job.direct) {
        convolve_rows(plane, kernels, job.shape, r0, rows, job.columns, scratch, job.scratch_step);
      } else {
        convolve(plane + r0 * job.planes.width, kernels, job.sweep, rows, job.columns, scratch,
                 job.scratch_step);
      }
      if (pool == 1) {
        finish_rows(scratch, job.scratch_step, rows, job.columns, bias, filters.relu, to);
      } else {
        finish_pool(scratch, job.scratch_step, rows, job.columns, pool, bias, filters.relu, to);
      }
    }
  }
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {
namespace {

struct PlanesRun {
  const KernelwiseConv& conv;
  ConvJob job;

  // Channels [begin, end) of a sample to planes; `planes` is where channel 0 goes.
  void fill(int64_t sample, int64_t begin, int64_t end, float* planes, float* turned) const {
    const ConvSizes& s = conv.sizes;
    const int64_t pixels = s.H * s.W;
    const float* from = conv.x + (conv.x_layout == Layout::batch_last ? sample : sample * s.C * pixels);
    float* to = planes + begin * job.planes.size;
    if (conv.x_layout == Layout::contiguous) {
      return LW_SELECT(conv_fill)(from + begin * pixels, job, end - begin, to);
    }
    float* middle = job.direct ? to : turned;
    LW_SELECT(conv_gather)(from, conv.x_layout, s.B, s.C, pixels, begin, end, middle);
    if (!job.direct) LW_SELECT(conv_fill)(middle, job, end - begin, to);
  }

  bool needs_planes() const { return !job.direct || conv.x_layout != Layout::contiguous; }

  // Filters [begin, end) of a sample, taken in `order`.
  void filters(int64_t sample, int64_t begin, int64_t end, const std::vector<int32_t>& order,
               const float* planes, float* scratch, float* turned) const {
    const int64_t pixels = conv.out_pixels(), count = conv.sizes.filters * pixels;
    if (!needs_planes()) planes = conv.x + sample * conv.sizes.C * job.planes.size;
    if (conv.y_layout == Layout::contiguous) {
      return LW_SELECT(conv_filters)(planes, job, order.data(), end - begin, scratch, conv.y + sample * count);
    }
    LW_SELECT(conv_filters)(planes, job, order.data(), end - begin, scratch, turned - begin * pixels);
    float* to = conv.y + (conv.y_layout == Layout::batch_last ? sample : sample * count);
    LW_SELECT(conv_scatter)(turned, conv.y_layout, conv.sizes.B, conv.sizes.filters, pixels, begin, end, to);
  }

  int64_t plane_floats() const { return needs_planes() ? conv.sizes.C * job.planes.size : 0; }
  int64_t scratch_floats() const { return job.band * job.scratch_step + kSlack; }

  // Floats of a sample's channels or filters on their way from or to another layout.
  int64_t turned_floats() const {
    const ConvSizes& s = conv.sizes;
    const int64_t in = conv.x_layout == Layout::contiguous || job.direct ? 0 : s.C * s.H * s.W;
    return std::max(in, conv.y_layout == Layout::contiguous ? 0 : s.filters * conv.out_pixels());
  }

  // Each worker pads and convolves samples of its own.
  void run_by_sample(int64_t first, int64_t last, int64_t threads) const {
    const ConvSizes& s = conv.sizes;
    const std::vector<int32_t> order = order_filters(job.filters.offsets, 0, s.filters);
    parallel_for(last - first, (last - first + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      const int64_t floats = plane_floats();
      Workspace<float> planes(floats + kSlack), scratch(scratch_floats()), turned(turned_floats());
      std::fill_n(planes.data() + floats, kSlack, 0.0f);
      for (int64_t b = first + begin; b < first + end; ++b) {
        if (needs_planes()) fill(b, 0, s.C, planes.data(), turned.data());
        filters(b, 0, s.filters, order, planes.data(), scratch.data(), turned.data());
      }
    });
  }

  // The few samples are padded together; then each worker takes a share of the filters.
  void run_by_filter(int64_t first, int64_t last, int64_t threads) const {
    const ConvSizes& s = conv.sizes;
    const int64_t floats = plane_floats();
    Workspace<float> planes((last - first) * floats + kSlack);
    std::fill_n(planes.data() + (last - first) * floats, kSlack, 0.0f);
    parallel_for(needs_planes() ? s.C : 0, (s.C + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      Workspace<float> turned(turned_floats());
      for (int64_t b = first; b < last; ++b) {
        fill(b, begin, end, planes.data() + (b - first) * floats, turned.data());
      }
    });
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      Workspace<float> scratch(scratch_floats()), turned(turned_floats());
      const int64_t from = share_kernels(job.filters.offsets, s.filters, begin, threads);
      const int64_t to = share_kernels(job.filters.offsets, s.filters, end, threads);
      const std::vector<int32_t> order = order_filters(job.filters.offsets, from, to);
      for (int64_t b = first; b < last; ++b) {
        filters(b, from, to, order, planes.data() + (b - first) * floats, scratch.data(), turned.data());
      }
    });
  }
};

// Whether tiles of whole vectors waste little enough for rows.h to be the faster way.
bool prefer_direct(const ConvSizes& s, int64_t lanes) {
  for (int d = 0; d < 2; ++d) {
    if (s.kernel[d] != 3 || s.stride[d] != 1 || s.dilation[d] != 1 || s.padding[d] > 1) return false;
  }
  const int64_t vectors = (s.width + lanes - 1) / lanes;
  return s.width * 3 >= vectors * lanes * 2;
}

// Fills in everything about the job that sizes and taps decide; the job points into the plan.
void plan_job(const ConvSizes& s, int64_t lanes, TapPlan& plan, ConvJob& job) {
  const int64_t height = s.height + plan.reach[0], exact = s.width + plan.reach[1];
  const int64_t phases = int64_t(plan.phases.size()), pool = job.filters.pool;
  job.rows = s.height / pool * pool;
  job.columns = s.width;
  job.kernel_size = int32_t(s.kernel[0] * s.kernel[1]);
  job.direct = prefer_direct(s, lanes);
  if (job.direct) {
    job.shape = {s.H, s.W, {s.padding[0], s.padding[1]}};
    job.planes.size = s.H * s.W;
    job.scratch_step = (s.width + 15) / 16 * 16;
    job.band = pick_band(job.rows, s.C * s.W / 4, job.scratch_step, pool);
    return;
  }
  const bool flat = prefer_flat(job.rows, s.width, exact, s.kernel[0] * s.kernel[1] == 1);
  const int64_t width = flat ? exact : round_width(exact);
  const int64_t size = (phases * height * width + 15) / 16 * 16;
  plan_runs(s, height, width, false, flat, plan);
  job.picture = picture_of(s);
  job.planes = {height, width, size, plan.phases.data(), phases};
  job.sweep = {plan.runs.data(), int64_t(plan.runs.size()), size, width, flat};
  job.scratch_step = flat ? width : (s.width + 15) / 16 * 16;
  job.band = pick_band(job.rows, s.C * phases * width, job.scratch_step, pool);
}

}  // namespace

void run_planes(const KernelwiseConv& conv, int64_t begin, int64_t end) {
  const ConvSizes& s = conv.sizes;
  PlanesRun run{conv, {}};
  run.job.filters = conv.filters;
  TapPlan plan = plan_taps(s);
  plan_job(s, cpu_lanes(), plan, run.job);
  const int64_t threads = threads_for(s, conv.kept), samples = end - begin;
  const bool by_sample = threads == 1 || samples % threads == 0 || samples >= 8 * threads;
  if (by_sample) run.run_by_sample(begin, end, threads);
  else run.run_by_filter(begin, end, threads);
}

}  // namespace liveweight
#endif  // LW_BASE
