// kernelwise_conv2d, one sample at a time: any kernel, stride, padding and dilation.
//
// For each filter its kept kernels, over tiles of rows held in registers, from padded planes (planes.h).
// Bias, activation and pool are applied while the filter's output is in the first-level cache. The order
// of a sum never depends on threads.
#include "kernelwise_conv2d.h"
#include "kernelwise_conv2d_finish.h"
#include "planes.h"

namespace liveweight {

struct ConvJob {
  KeptFilters filters;
  Picture picture;
  PlaneShape planes;
  Sweep sweep;
  int32_t kernel_size;
  int64_t rows, columns, band;  // rows: those that a pool uses
  int64_t scratch_step;         // floats between output rows before the epilogue
};

}  // namespace liveweight

LW_DECLARE(void conv_fill(const float* x, const ConvJob& job, int64_t count, float* planes))
LW_DECLARE(void conv_filters(const float* planes, const ConvJob& job, const int32_t* order, int64_t count,
                             float* scratch, float* y))

namespace liveweight::LW_ISA {

void conv_fill(const float* x, const ConvJob& job, int64_t count, float* planes) {
  const int64_t size = job.picture.height * job.picture.width;
  for (int64_t c = 0; c < count; ++c) {
    fill_planes(x + c * size, job.picture, job.planes, planes + c * job.planes.size);
  }
}

LW_INLINE void fill_row(float* out, float value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = value;
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
      convolve(plane + r0 * job.planes.width, kernels, job.sweep, rows, job.columns, scratch, job.scratch_step);
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
  void fill(int64_t sample, int64_t begin, int64_t end, float* planes) const {
    const int64_t pixels = conv.sizes.H * conv.sizes.W;
    const float* from = conv.x + (sample * conv.sizes.C + begin) * pixels;
    LW_SELECT(conv_fill)(from, job, end - begin, planes + begin * job.planes.size);
  }

  // Filters [begin, end) of a sample, taken in `order`.
  void filters(int64_t sample, int64_t begin, int64_t end, const std::vector<int32_t>& order,
               const float* planes, float* scratch) const {
    float* y = conv.y + sample * conv.sizes.filters * conv.out_pixels();
    LW_SELECT(conv_filters)(planes, job, order.data(), end - begin, scratch, y);
  }

  int64_t buffer_floats(int64_t) const { return conv.sizes.C * job.planes.size; }
  int64_t scratch_floats() const { return job.band * job.scratch_step + kSlack; }
};

// Fills in everything about the job that sizes and taps decide; the job points into the plan.
void plan_job(const ConvSizes& s, TapPlan& plan, ConvJob& job) {
  const int64_t height = s.height + plan.reach[0], exact = s.width + plan.reach[1];
  const int64_t phases = int64_t(plan.phases.size()), pool = job.filters.pool;
  job.rows = s.height / pool * pool;
  job.columns = s.width;
  job.kernel_size = int32_t(s.kernel[0] * s.kernel[1]);
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
  plan_job(s, plan, run.job);
  run_items(run, conv, begin, end);
}

}  // namespace liveweight
#endif  // LW_BASE
