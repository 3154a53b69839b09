// kernelwise_conv2d of pictures whose layout its paths do not read or write: by contiguous copies of a few
// samples at a time, which stay in a cache.
#include "kernelwise_conv2d.h"

LW_DECLARE(void turn_pictures(const float* in, Layout layout, int64_t batch, int64_t channels, int64_t pixels,
                              int64_t samples, int64_t begin, int64_t end, float* out))
LW_DECLARE(void turn_back(const float* in, Layout layout, int64_t batch, int64_t channels, int64_t pixels,
                          int64_t samples, int64_t begin, int64_t end, float* out))

namespace liveweight::LW_ISA {

// Channels [begin, end) of the samples that `in` points to, channels last or batch last,
// to contiguous pictures.
void turn_pictures(const float* in, Layout layout, int64_t batch, int64_t channels, int64_t pixels,
                   int64_t samples, int64_t begin, int64_t end, float* out) {
  const int64_t size = channels * pixels;
  out += begin * pixels;
  if (layout == Layout::batch_last) {
    return transpose_rows(in + begin * pixels * batch, batch, out, size, (end - begin) * pixels, samples);
  }
  for (int64_t s = 0; s < samples; ++s, in += size, out += size) {
    transpose_rows(in + begin, channels, out, pixels, pixels, end - begin);
  }
}

// The reverse: channels [begin, end) of contiguous pictures to those that `out` points to.
void turn_back(const float* in, Layout layout, int64_t batch, int64_t channels, int64_t pixels,
               int64_t samples, int64_t begin, int64_t end, float* out) {
  const int64_t size = channels * pixels;
  in += begin * pixels;
  if (layout == Layout::batch_last) {
    return transpose_rows(in, size, out + begin * pixels * batch, batch, samples, (end - begin) * pixels);
  }
  for (int64_t s = 0; s < samples; ++s, in += size, out += size) {
    transpose_rows(in, pixels, out + begin, channels, end - begin, pixels);
  }
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {

void run_turned(const KernelwiseConv& conv, int64_t begin, int64_t end) {
  constexpr int64_t kLine = 16;  // samples of a cache line, and more than are folded together
  const ConvSizes& s = conv.sizes;
  // How narrow pictures are folded, and so how sums are rounded, must not depend on threads.
  const bool line = conv.x_layout == Layout::batch_last || conv.y_layout == Layout::batch_last ||
                    prefer_folded(s, cpu_lanes());
  const int64_t threads = threads_for(s, conv.kept), most = std::min(end - begin, line ? kLine : threads);
  const int64_t in = s.C * s.H * s.W, out = s.filters * conv.out_pixels();
  const bool turn_in = conv.x_layout != Layout::contiguous, turn_out = conv.y_layout != Layout::contiguous;
  const auto sample_at = [](Layout layout, int64_t b, int64_t size) {
    return layout == Layout::batch_last ? b : b * size;
  };
  Workspace<float> x(turn_in ? most * in : 0), y(turn_out ? most * out : 0);
  KernelwiseConv part = conv;
  part.x_layout = part.y_layout = Layout::contiguous;
  for (int64_t b = begin; b < end; b += most) {
    part.sizes.B = std::min(most, end - b);
    const float* from = conv.x + sample_at(conv.x_layout, b, in);
    float* to = conv.y + sample_at(conv.y_layout, b, out);
    part.x = turn_in ? x.data() : from;
    part.y = turn_out ? y.data() : to;
    if (turn_in) {
      parallel_for(s.C, (s.C + threads - 1) / threads, [&](int64_t c0, int64_t c1) {
        LW_SELECT(turn_pictures)(from, conv.x_layout, s.B, s.C, s.H * s.W, part.sizes.B, c0, c1, x.data());
      });
    }
    if (prefer_pointwise(part)) run_pointwise(part);
    else run_contiguous(part, 0, part.sizes.B);
    if (turn_out) {
      parallel_for(s.filters, (s.filters + threads - 1) / threads, [&](int64_t f0, int64_t f1) {
        LW_SELECT(turn_back)(y.data(), conv.y_layout, s.B, s.filters, conv.out_pixels(), part.sizes.B, f0, f1, to);
      });
    }
  }
}

}  // namespace liveweight
#endif  // LW_BASE
