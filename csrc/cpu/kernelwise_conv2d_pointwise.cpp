// kernelwise_conv2d with 1 x 1 kernels of stride 1: y = W x with pixels in the lanes.
//
// A tile of pixels of all channels is copied side by side, so that it stays in the first-level cache
// while all filters use it; each kept weight then meets it in a few vectors.
#include "kernelwise_conv2d.h"
#include "planes.h"

namespace liveweight {

struct PointwiseJob {
  KeptFilters filters;
  int64_t channels, pixels;
};

}  // namespace liveweight

LW_DECLARE(void pointwise_tile(const float* x, const PointwiseJob& job, const int32_t* order, int64_t count,
                               int64_t pixel, int64_t vectors, float* packed, float* y))

namespace liveweight::LW_ISA {

template <int kVectors>
LW_INLINE void pointwise_filter(const float* packed, const float* values, const int32_t* channels,
                                int32_t count, float bias, bool use_relu, int64_t pixels, float* y) {
  constexpr int kChains = kVectors >= 3 ? 2 : 4;  // sums of each that hide a multiply-add's latency
  constexpr int64_t kStep = kVectors * kLanes;
  Vec acc[kChains][kVectors];
  for (int chain = 0; chain < kChains; ++chain) {
    for (int v = 0; v < kVectors; ++v) acc[chain][v] = chain ? zero() : broadcast(bias);
  }
  int32_t i = 0;
  for (; i + kChains <= count; i += kChains) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      const float* p = packed + channels[i + chain] * kStep;
      const Vec weight = broadcast(values[i + chain]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[chain][v] = fma(load(p + v * kLanes), weight, acc[chain][v]);
    }
  }
  for (; i < count; ++i) {
    const float* p = packed + channels[i] * kStep;
    const Vec weight = broadcast(values[i]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[0][v] = fma(load(p + v * kLanes), weight, acc[0][v]);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    Vec sum = acc[0][v] + acc[1][v];
    if constexpr (kChains == 4) sum = sum + (acc[2][v] + acc[3][v]);
    if (use_relu) sum = relu(sum);
    const int64_t left = pixels - v * kLanes;
    if (left >= kLanes) store(y + v * kLanes, sum);
    else if (left > 0) store_first(y + v * kLanes, sum, int(left));
  }
}

template <int kVectors>
LW_INLINE void pointwise_run(const float* x, const PointwiseJob& job, const int32_t* order, int64_t count,
                             int64_t pixel, float* packed, float* y) {
  constexpr int64_t kStep = kVectors * kLanes;
  const KeptFilters& filters = job.filters;
  const int64_t pixels = clamp(job.pixels - pixel, 0, kStep);
  const int last = int(clamp(pixels - (kVectors - 1) * kLanes, 0, kLanes));
  const float* from = x + pixel;
  for (int64_t c = 0; c < job.channels; ++c, from += job.pixels) {
    float* to = packed + c * kStep;
#pragma GCC unroll 4
    for (int v = 0; v + 1 < kVectors; ++v) store(to + v * kLanes, load(from + v * kLanes));
    const float* end = from + (kVectors - 1) * kLanes;
    store(to + (kVectors - 1) * kLanes, last == kLanes ? load(end) : load_first(end, last));
  }
  for (int64_t n = 0; n < count; ++n) {
    const int32_t o = order[n], first = filters.offsets[o];
    const float* group = packed + o / filters.group_filters * filters.group_channels * kStep;
    pointwise_filter<kVectors>(group, filters.values + first, filters.channels + first,
                               filters.offsets[o + 1] - first, filters.bias ? filters.bias[o] : 0.0f,
                               filters.relu, pixels, y + o * job.pixels + pixel);
  }
}

// Filters order[0 .. count) of `vectors` vectors of a sample's pixels, from `pixel` on.
void pointwise_tile(const float* x, const PointwiseJob& job, const int32_t* order, int64_t count,
                    int64_t pixel, int64_t vectors, float* packed, float* y) {
  switch (vectors) {
    case 1: return pointwise_run<1>(x, job, order, count, pixel, packed, y);
    case 2: return pointwise_run<2>(x, job, order, count, pixel, packed, y);
    case 3: return pointwise_run<3>(x, job, order, count, pixel, packed, y);
    default: return pointwise_run<4>(x, job, order, count, pixel, packed, y);
  }
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {
namespace {

// Vectors of a tile at most: all channels of it stay near the first-level cache. Up to four times its
// size, longer tiles, which need fewer weights and indices, are still the better ones.
int64_t most_vectors(int64_t channels, int64_t lanes) {
  return std::clamp<int64_t>(48 * 1024 / std::max<int64_t>(channels * lanes, 1), 1, 4);
}

}  // namespace

bool prefer_pointwise(const KernelwiseConv& conv) {
  const ConvSizes& s = conv.sizes;
  bool plain = conv.filters.pool == 1 && conv.x_layout == conv.y_layout && conv.x_layout != Layout::channels_last;
  for (int d = 0; d < 2; ++d) plain &= s.kernel[d] == 1 && s.stride[d] == 1 && s.padding[d] == 0;
  return plain;
}

void run_pointwise(const KernelwiseConv& conv) {
  const ConvSizes& s = conv.sizes;
  // Samples side by side are one picture with more pixels.
  const int64_t joined = conv.x_layout == Layout::batch_last ? s.B : 1, samples = s.B / joined;
  const PointwiseJob job{conv.filters, s.C, s.H * s.W * joined};
  const int64_t lanes = cpu_lanes(), vectors = (job.pixels + lanes - 1) / lanes;
  const int64_t most = most_vectors(s.C, lanes), tiles = (vectors + most - 1) / most;
  const int64_t items = samples * tiles, threads = threads_for(s, conv.kept);
  const std::vector<int32_t> order = order_filters(job.filters.offsets, 0, s.filters);
  parallel_for(items, (items + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    Workspace<float> packed(s.C * most * lanes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tiles, from = i % tiles * vectors / tiles, to = (i % tiles + 1) * vectors / tiles;
      LW_SELECT(pointwise_tile)(conv.x + b * s.C * job.pixels, job, order.data(), s.filters, from * lanes,
                                to - from, packed.data(), conv.y + b * s.filters * job.pixels);
    }
  });
}

}  // namespace liveweight
#endif  // LW_BASE
