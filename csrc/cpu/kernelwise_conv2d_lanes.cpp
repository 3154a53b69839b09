// kernelwise_conv2d of small planes: 16 samples side by side in the lanes of vectors.
//
// Panels hold [channel][row][column][16 samples]. Every tap of every output then reads one aligned
// vector, no lane is lost at the end of a short row, and taps in the padding are skipped rather than
// multiplied. A tile of outputs and the nine weights of a kernel are held in registers.
#include "kernelwise_conv2d.h"
#include "planes.h"

namespace liveweight {

constexpr int64_t kPanel = 16;       // samples of a panel
constexpr int64_t kFilterBlock = 16;  // filters finished together

struct LanesJob {
  KeptFilters filters;
  int64_t H, W, height, width;  // of the input, and of the output before any pooling
  int64_t padding[2], stride;
};

}  // namespace liveweight

LW_DECLARE(void lanes_pack(const float* x, Layout layout, int64_t batch, int64_t channels, int64_t pixels,
                           int64_t samples, int64_t begin, int64_t end, float* panel))
LW_DECLARE(void lanes_filter(const float* panel, const LanesJob& job, int64_t filter, float* scratch, float* out))
LW_DECLARE(void lanes_unpack(const float* in, Layout layout, int64_t batch, int64_t filters, int64_t pixels,
                             int64_t samples, int64_t first, int64_t count, float* y))

namespace liveweight::LW_ISA {

constexpr int kTileRows = kRegisters >= 32 ? 4 : 2;
constexpr int kTileColumns = 4;

// Channels [begin, end) of up to 16 samples; x points to the first of them.
void lanes_pack(const float* x, Layout layout, int64_t batch, int64_t channels, int64_t pixels,
                int64_t samples, int64_t begin, int64_t end, float* panel) {
  const int64_t count = (end - begin) * pixels;
  float* to = panel + begin * pixels * kPanel;
  if (layout == Layout::batch_last) {
    for (int64_t i = 0; i < count; ++i) {
      const float* from = x + (begin * pixels + i) * batch;
      for (int64_t l = 0; l < kPanel; l += kLanes) {
        store(to + i * kPanel + l, load_first(from + l, int(clamp(samples - l, 0, kLanes))));
      }
    }
    return;
  }
  if (samples < kPanel) fill_zero(to, count * kPanel);
  if (layout == Layout::contiguous) {
    return transpose_rows(x + begin * pixels, channels * pixels, to, kPanel, samples, count);
  }
  for (int64_t p = 0; p < pixels; ++p) {
    transpose_rows(x + p * channels + begin, channels * pixels, to + p * kPanel, pixels * kPanel, samples,
                   end - begin);
  }
}

// Outputs [r0, r0 + kRows) x [c0, c0 + kColumns) of one filter for kLanes samples.
template <int kRows, int kColumns, int kStride>
void lanes_tile(const float* panel, const KernelList& kernels, const LanesJob& job, int64_t r0, int64_t c0,
                float* out) {
  constexpr int kInRows = (kRows - 1) * kStride + 3, kInColumns = (kColumns - 1) * kStride + 3;
  const int64_t top = r0 * kStride - job.padding[0], left = c0 * kStride - job.padding[1];
  // Only the first and the last rows and columns of a tile can lie in the padding.
  const int64_t first_row = -top, end_row = job.H - top, first_column = -left, end_column = job.W - left;
  Vec acc[kRows][kColumns];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) acc[r][c] = zero();
  }
  const int64_t plane = job.H * job.W * kPanel, row_step = job.W * kPanel;
  const float* corner = panel + top * row_step + left * kPanel;
  for (int32_t i = 0; i < kernels.count; ++i) {
    const float* p = corner + kernels.sources[i] * plane;
    Vec weight[9];
#pragma GCC unroll 9
    for (int j = 0; j < 9; ++j) weight[j] = broadcast(kernels.values[i * 9 + j]);
#pragma GCC unroll 9
    for (int t = 0; t < kInRows; ++t) {
      if ((t == 0 && t < first_row) || (t >= kInRows - 2 && t >= end_row)) continue;
#pragma GCC unroll 9
      for (int u = 0; u < kInColumns; ++u) {
        if ((u == 0 && u < first_column) || (u >= kInColumns - 2 && u >= end_column)) continue;
        const Vec v = load(p + t * row_step + u * kPanel);
#pragma GCC unroll 3
        for (int a = 0; a < 3; ++a) {
#pragma GCC unroll 3
          for (int b = 0; b < 3; ++b) {
            const int r = (t - a) / kStride, c = (u - b) / kStride;
            if (t < a || u < b || (t - a) % kStride || (u - b) % kStride || r >= kRows || c >= kColumns) continue;
            acc[r][c] = fma(v, weight[3 * a + b], acc[r][c]);
          }
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) store(out + ((r0 + r) * job.width + c0 + c) * kPanel, acc[r][c]);
  }
}

template <int kRows, int kStride>
LW_INLINE void lanes_row(const float* panel, const KernelList& kernels, const LanesJob& job, int64_t r0,
                         float* out) {
  for (int64_t tiles = (job.width + kTileColumns - 1) / kTileColumns, c = 0; tiles > 0; --tiles) {
    const int64_t count = (job.width - c + tiles - 1) / tiles;
    switch (count) {
      case 1: lanes_tile<kRows, 1, kStride>(panel, kernels, job, r0, c, out); break;
      case 2: lanes_tile<kRows, 2, kStride>(panel, kernels, job, r0, c, out); break;
      case 3: lanes_tile<kRows, 3, kStride>(panel, kernels, job, r0, c, out); break;
      default: lanes_tile<kRows, 4, kStride>(panel, kernels, job, r0, c, out);
    }
    c += count;
  }
}

template <int kStride>
LW_INLINE void lanes_plane(const float* panel, const KernelList& kernels, const LanesJob& job, float* out) {
  for (int64_t tiles = (job.height + kTileRows - 1) / kTileRows, r = 0; tiles > 0; --tiles) {
    const int64_t count = (job.height - r + tiles - 1) / tiles;
    switch (count) {
      case 1: lanes_row<1, kStride>(panel, kernels, job, r, out); break;
      case 2: lanes_row<2, kStride>(panel, kernels, job, r, out); break;
      case 3: lanes_row<kTileRows < 3 ? 1 : 3, kStride>(panel, kernels, job, r, out); break;
      default: lanes_row<kTileRows < 4 ? 1 : 4, kStride>(panel, kernels, job, r, out);
    }
    r += count;
  }
}

// One filter of a panel: pool(act(sum + bias)) as [pixel][16 samples].
void lanes_filter(const float* panel, const LanesJob& job, int64_t filter, float* scratch, float* out) {
  const KeptFilters& filters = job.filters;
  const int32_t begin = filters.offsets[filter];
  const KernelList kernels{filters.values + int64_t(begin) * 9, filters.channels + begin, nullptr,
                           filters.offsets[filter + 1] - begin, 9};
  const int64_t pool = filters.pool, rows = job.height / pool, columns = job.width / pool;
  const float* first = panel + filter / filters.group_filters * filters.group_channels * job.H * job.W * kPanel;
  const Vec shift = broadcast(filters.bias ? filters.bias[filter] : 0.0f);
  for (int64_t l = 0; l < kPanel; l += kLanes) {
    if (job.stride == 1) lanes_plane<1>(first + l, kernels, job, scratch + l);
    else lanes_plane<2>(first + l, kernels, job, scratch + l);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        const float* from = scratch + (r * pool * job.width + c * pool) * kPanel + l;
        Lanes<kLanes> best = load_lanes<kLanes>(from);
        for (int64_t i = 0; i < pool * pool; ++i) {
          best = max_or_nan(best, load_lanes<kLanes>(from + (i / pool * job.width + i % pool) * kPanel));
        }
        Vec v;
        __builtin_memcpy(&v, &best, sizeof v);
        v = v + shift;
        store(out + (r * columns + c) * kPanel + l, filters.relu ? relu(v) : v);
      }
    }
  }
}

// Filters [first, first + count) of a panel to y, which points to the panel's first sample.
void lanes_unpack(const float* in, Layout layout, int64_t batch, int64_t filters, int64_t pixels,
                  int64_t samples, int64_t first, int64_t count, float* y) {
  if (layout == Layout::batch_last) {
    for (int64_t i = 0; i < count * pixels; ++i) {
      float* to = y + (first * pixels + i) * batch;
      for (int64_t l = 0; l < kPanel; l += kLanes) {
        store_first(to + l, load(in + i * kPanel + l), int(clamp(samples - l, 0, kLanes)));
      }
    }
  } else if (layout == Layout::contiguous) {
    transpose_rows(in, kPanel, y + first * pixels, filters * pixels, count * pixels, samples);
  } else {
    for (int64_t p = 0; p < pixels; ++p) {
      transpose_rows(in + p * kPanel, pixels * kPanel, y + p * filters + first, filters * pixels, count, samples);
    }
  }
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {
namespace {

struct LanesRun {
  const KernelwiseConv& conv;
  LanesJob job;

  int64_t panel_floats() const { return conv.sizes.C * conv.sizes.H * conv.sizes.W * kPanel; }

  // Where sample `b` begins, in x or in y.
  template <class T>
  static T* sample_at(T* data, Layout layout, int64_t b, int64_t size) {
    return data + (layout == Layout::batch_last ? b : b * size);
  }

  void pack(int64_t b, int64_t samples, int64_t begin, int64_t end, float* panel) const {
    const ConvSizes& s = conv.sizes;
    const float* x = sample_at(conv.x, conv.x_layout, b, s.C * s.H * s.W);
    LW_SELECT(lanes_pack)(x, conv.x_layout, s.B, s.C, s.H * s.W, samples, begin, end, panel);
  }

  void filters(int64_t b, int64_t samples, int64_t begin, int64_t end, const float* panel) const {
    const int64_t pixels = conv.out_pixels(), count = conv.sizes.filters;
    Workspace<float> scratch(job.height * job.width * kPanel), block(kFilterBlock * pixels * kPanel);
    float* y = sample_at(conv.y, conv.y_layout, b, count * pixels);
    for (int64_t o = begin; o < end; o += kFilterBlock) {
      const int64_t together = std::min(end - o, kFilterBlock);
      for (int64_t i = 0; i < together; ++i) {
        LW_SELECT(lanes_filter)(panel, job, o + i, scratch.data(), block.data() + i * pixels * kPanel);
      }
      LW_SELECT(lanes_unpack)(block.data(), conv.y_layout, conv.sizes.B, count, pixels, samples, o, together, y);
    }
  }

  void run(int64_t begin, int64_t end, int64_t threads) const {
    const ConvSizes& s = conv.sizes;
    const int64_t panels = (end - begin + kPanel - 1) / kPanel;
    const auto samples_of = [&](int64_t b) { return std::min(end - b, kPanel); };
    if (panels % threads == 0) {
      return parallel_for(panels, panels / threads, [&](int64_t from, int64_t to) {
        Workspace<float> panel(panel_floats());
        for (int64_t b = begin + from * kPanel; b < std::min(end, begin + to * kPanel); b += kPanel) {
          pack(b, samples_of(b), 0, s.C, panel.data());
          filters(b, samples_of(b), 0, s.filters, panel.data());
        }
      });
    }
    Workspace<float> panel(panel_floats());
    for (int64_t b = begin; b < end; b += kPanel) {
      parallel_for(s.C, (s.C + threads - 1) / threads, [&](int64_t from, int64_t to) {
        pack(b, samples_of(b), from, to, panel.data());
      });
      parallel_for(threads, 1, [&](int64_t part, int64_t last) {
        filters(b, samples_of(b), share_kernels(job.filters.offsets, s.filters, part, threads),
                share_kernels(job.filters.offsets, s.filters, last, threads), panel.data());
      });
    }
  }
};

}  // namespace

int64_t lanes_samples(const KernelwiseConv& conv, int64_t lanes) {
  const ConvSizes& s = conv.sizes;
  for (int d = 0; d < 2; ++d) {
    if (s.kernel[d] != 3 || s.dilation[d] != 1 || s.padding[d] > 1 || s.stride[d] > 2) return 0;
  }
  // A panel should stay in the second-level cache.
  if (s.stride[0] != s.stride[1] || std::min(s.H, s.W) < 2 || s.C * s.H * s.W > 32 * 1024) return 0;
  // Side by side, samples need no turning when they lie so, and taps in the padding are not multiplied,
  // which are many on 4 x 4 pixels; otherwise sums are as fast.
  const bool turned = conv.x_layout != Layout::batch_last || conv.y_layout != Layout::batch_last;
  if (turned && s.H * s.W > 16 && (prefer_wide(s, lanes) || prefer_folded(s, lanes))) return 0;
  // What is left over fills a panel well enough from 10 samples on.
  const int64_t rest = s.B % kPanel;
  return rest >= 10 ? s.B : s.B - rest;
}

void run_lanes(const KernelwiseConv& conv, int64_t begin, int64_t end) {
  const ConvSizes& s = conv.sizes;
  const LanesRun run{conv, {conv.filters, s.H, s.W, s.height, s.width, {s.padding[0], s.padding[1]}, s.stride[0]}};
  run.run(begin, end, threads_for(s, conv.kept));
}

}  // namespace liveweight
#endif  // LW_BASE
