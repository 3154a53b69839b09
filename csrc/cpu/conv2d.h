// Sizes of a kernelwise convolution, argument checks and the plan that its kernels follow.
#pragma once

#include "dispatch.h"
#include "planes.h"

#ifdef LW_BASE
#include <algorithm>
#include <vector>

namespace liveweight {

constexpr int64_t kSlack = 64;         // floats past the last plane that whole vectors may read

struct ConvSizes {
  int64_t B, C, H, W, filters, groups;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t height, width;  // of the output before any pooling
};

inline void read_pair(const char* op, const char* name, const std::vector<int64_t>& pair, int64_t least,
                      int64_t* out) {
  LW_CHECK(pair.size() == 2 && std::min(pair[0], pair[1]) >= least, op, ": ", name,
           " must be two numbers >= ", least);
  out[0] = pair[0];
  out[1] = pair[1];
}

inline ConvSizes conv_sizes(const char* op, const std::vector<int64_t>& x_shape, int64_t filters,
                            const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                            const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                            int64_t groups) {
  ConvSizes s{};
  LW_CHECK(x_shape.size() == 4, op, ": expected 4 sizes of x, got ", x_shape.size());
  s.B = x_shape[0], s.C = x_shape[1], s.H = x_shape[2], s.W = x_shape[3];
  s.filters = filters, s.groups = groups;
  read_pair(op, "kernel_size", kernel, 1, s.kernel);
  read_pair(op, "stride", stride, 1, s.stride);
  read_pair(op, "padding", padding, 0, s.padding);
  read_pair(op, "dilation", dilation, 1, s.dilation);
  LW_CHECK(std::min(std::min(s.B, s.C), std::min(s.H, s.W)) >= 0, op, ": negative size of x");
  LW_CHECK(groups >= 1 && s.C % groups == 0 && filters % groups == 0, op, ": ", s.C, " channels and ",
           filters, " filters do not form ", groups, " groups");
  for (int d = 0; d < 2; ++d) {
    const int64_t reach = s.dilation[d] * (s.kernel[d] - 1) + 1;
    const int64_t room = (d ? s.W : s.H) + 2 * s.padding[d] - reach;
    LW_CHECK(room >= 0, op, ": x of ", s.H, " x ", s.W, " is smaller than the kernel");
    (d ? s.width : s.height) = room / s.stride[d] + 1;
  }
  return s;
}

// Output gradient of the shape that the sizes say; its data.
inline const float* check_grad(const char* op, const Tensor& grad, const ConvSizes& s) {
  const float* data = checked_data<float>(op, "grad", grad, 4, ScalarType::Float);
  LW_CHECK(grad.size(0) == s.B && grad.size(1) == s.filters && grad.size(2) == s.height &&
               grad.size(3) == s.width,
           op, ": expected grad [", s.B, ", ", s.filters, ", ", s.height, ", ", s.width, "], got ",
           shape_of(grad));
  return data;
}

// Threads worth waking for so many kept kernels.
inline int64_t threads_for(const ConvSizes& s, int64_t kept) {
  const double taps = double(kept) * double(s.kernel[0] * s.kernel[1]);
  const bool small = taps * double(s.B) * double(s.height * s.width) < 5e5;
  return small ? 1 : int64_t(torch::stable::get_num_threads());
}

// Whether each worker takes samples of its own; else all share the work on each sample.
inline bool split_samples(const ConvSizes& s, int64_t threads) {
  return threads == 1 || s.B % threads == 0 || s.B >= 8 * threads;
}

// x as forward cuts it into planes.
inline Picture picture_of(const ConvSizes& s) {
  return {s.H, s.W, {s.stride[0], s.stride[1]}, {s.padding[0], s.padding[1]}};
}

struct KeptKernels {
  const int32_t* offsets;
  const int32_t* channels;
  int64_t count;
};

// Guards memory at the cost of one look per filter: channels rise inside a filter (the format checks
// that once), so the first and the last of a filter bound the others.
inline KeptKernels check_kept(const char* op, const Tensor& offsets, const Tensor& channels,
                              int64_t group_channels) {
  KeptKernels kept{checked_data<int32_t>(op, "filter_offsets", offsets, 1, ScalarType::Int),
                   checked_data<int32_t>(op, "channels", channels, 1, ScalarType::Int),
                   channels.numel()};
  const int64_t filters = offsets.numel() - 1;
  LW_CHECK(filters >= 0, op, ": filter_offsets is empty");
  const int32_t* at = kept.offsets;
  bool ordered = at[0] == 0 && at[filters] == kept.count;
  for (int64_t o = 0; o < filters; ++o) ordered &= at[o] <= at[o + 1];
  LW_CHECK(ordered, op, ": filter_offsets must rise from 0 to ", kept.count);
  bool inside = true;
  for (int64_t o = 0; o < filters; ++o) {
    if (at[o] < at[o + 1]) inside &= kept.channels[at[o]] >= 0 && kept.channels[at[o + 1] - 1] < group_channels;
  }
  LW_CHECK(inside, op, ": channels must be in [0, ", group_channels, ")");
  return kept;
}

// Taps of a kernel sorted into runs, for the phases that they read.
struct TapPlan {
  std::vector<Phase> phases;
  std::vector<Run> runs;             // by phase, if reversed; offsets already hold the phase
  std::vector<int64_t> phase_begin;  // runs of phase i: [phase_begin[i], phase_begin[i + 1])
  int64_t reach[2];                  // largest row and column offset inside a phase
};

// Which taps i of one axis fall into a phase, and their offsets there: consecutive offsets form a run.
struct AxisTaps {
  std::vector<int64_t> tap, offset;
};

inline AxisTaps axis_taps(int64_t kernel, int64_t stride, int64_t dilation, int64_t phase) {
  AxisTaps taps;
  for (int64_t i = 0; i < kernel; ++i) {
    if (i * dilation % stride != phase) continue;
    taps.tap.push_back(i);
    taps.offset.push_back(i * dilation / stride);
  }
  return taps;
}

inline TapPlan plan_taps(const ConvSizes& s) {
  TapPlan plan;
  for (int64_t a = 0; a < s.stride[0]; ++a) {
    if (axis_taps(s.kernel[0], s.stride[0], s.dilation[0], a).tap.empty()) continue;
    for (int64_t b = 0; b < s.stride[1]; ++b) {
      if (!axis_taps(s.kernel[1], s.stride[1], s.dilation[1], b).tap.empty()) plan.phases.push_back({a, b});
    }
  }
  for (int d = 0; d < 2; ++d) plan.reach[d] = (s.kernel[d] - 1) * s.dilation[d] / s.stride[d];
  return plan;
}

// Runs for planes with rows of `width` and `height` rows a phase. Forward, output row r reads row
// r + offset; reversed (gradient to x) it reads row r - offset of a single phase whose rows and
// columns begin `reach` before the picture. Single: no run longer than one tap.
inline void plan_runs(const ConvSizes& s, int64_t height, int64_t width, bool reversed, bool single,
                      TapPlan& plan) {
  const int64_t longest = single ? 1 : kLongestRun;
  plan.phase_begin.push_back(0);
  for (size_t phase = 0; phase < plan.phases.size(); ++phase) {
    const AxisTaps rows = axis_taps(s.kernel[0], s.stride[0], s.dilation[0], plan.phases[phase].row);
    const AxisTaps columns = axis_taps(s.kernel[1], s.stride[1], s.dilation[1], plan.phases[phase].column);
    for (size_t j = 0; j < columns.tap.size(); ++j) {
      for (size_t i = 0; i < rows.tap.size();) {
        size_t next = i + 1;
        while (next < rows.tap.size() && rows.offset[next] == rows.offset[next - 1] + 1 &&
               int64_t(next - i) < longest) {
          ++next;
        }
        const size_t start = reversed ? next - 1 : i;  // the tap that reads the highest row
        const int64_t step = next - i > 1 ? (rows.tap[i + 1] - rows.tap[i]) * s.kernel[1] : 0;
        Run run;
        run.offset = reversed ? (plan.reach[0] - rows.offset[start]) * width + plan.reach[1] - columns.offset[j]
                              : (int64_t(phase) * height + rows.offset[i]) * width + columns.offset[j];
        run.count = int32_t(next - i);
        run.weight = int32_t(rows.tap[start] * s.kernel[1] + columns.tap[j]);
        run.step = int32_t(reversed ? -step : step);
        plan.runs.push_back(run);
        i = next;
      }
    }
    plan.phase_begin.push_back(int64_t(plan.runs.size()));
  }
}

// A row of 9 to 16 floats is not split by a cache line when rows are 16 apart.
inline int64_t round_width(int64_t width) { return width > 8 && width <= 16 ? 16 : (width + 7) / 8 * 8; }

// Flat tiles waste the columns between rows and load for every multiply-add, which costs about 1.6
// times a run's; row tiles waste the lanes past a short row.
inline bool prefer_flat(int64_t rows, int64_t columns, int64_t width, bool single_tap) {
  const double flat = double(((rows - 1) * width + columns + 7) / 8);
  const double rowwise = double(rows * ((columns + 7) / 8));
  return single_tap ? flat <= rowwise : flat * 1.6 < rowwise;
}

// Rows computed together: their input of all channels stays in the second-level cache and their
// output in the first. Whole tiles of 8 rows and whole pools, if there is room.
inline int64_t pick_band(int64_t rows, int64_t input_row_floats, int64_t output_row_floats, int64_t pool) {
  const int64_t by_input = 128 * 1024 / std::max<int64_t>(input_row_floats, 1);
  const int64_t by_output = 4096 / std::max<int64_t>(output_row_floats, 1);
  int64_t band = std::max<int64_t>(std::min(by_input, by_output) / 8 * 8, 8);
  band = std::max(band / pool * pool, pool);
  return std::min(band, rows);
}

// Row at which part `part` of `parts` begins when kept kernels are shared evenly.
inline int64_t share_kernels(const int32_t* offsets, int64_t rows, int64_t part, int64_t parts) {
  if (part == parts) return rows;
  const int64_t wanted = (int64_t(offsets[rows]) + rows) * part / parts;
  int64_t row = 0;
  while (row < rows && offsets[row] + row < wanted) ++row;
  return row;
}

}  // namespace liveweight
#endif  // LW_BASE
