// kernelwise_conv2d in bf16: x, values and bias are widened to fp32 once, the result is rounded once.
#include "kernelwise_conv2d.h"

LW_DECLARE(void conv_widen(const Bf16* from, int64_t count, float* out))
LW_DECLARE(void conv_narrow(const float* from, int64_t count, Bf16* out))

namespace liveweight::LW_ISA {

void conv_widen(const Bf16* from, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(from + i));
  if (i < count) store_first(out + i, load_first(from + i, int(count - i)), int(count - i));
}

void conv_narrow(const float* from, int64_t count, Bf16* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(from + i));
  if (i < count) store_first(out + i, load_first(from + i, int(count - i)), int(count - i));
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {
namespace {

constexpr int64_t kGrain = 1 << 16;

void widen(const Bf16* from, int64_t count, float* out) {
  parallel_for(count, kGrain, [&](int64_t begin, int64_t end) {
    LW_SELECT(conv_widen)(from + begin, end - begin, out + begin);
  });
}

}  // namespace

void run_bf16(KernelwiseConv conv, const Bf16* x, const Bf16* values, const Bf16* bias, Bf16* y) {
  const ConvSizes& s = conv.sizes;
  const int64_t inputs = s.B * s.C * s.H * s.W, outputs = s.B * s.filters * conv.out_pixels();
  const int64_t weights = conv.kept * s.kernel[0] * s.kernel[1];
  Workspace<float> wide_x(inputs), wide_values(weights), wide_bias(s.filters), wide_y(outputs);
  widen(x, inputs, wide_x.data());
  widen(values, weights, wide_values.data());
  if (bias) widen(bias, s.filters, wide_bias.data());
  conv.x = wide_x.data();
  conv.filters.values = wide_values.data();
  conv.filters.bias = bias ? wide_bias.data() : nullptr;
  conv.y = wide_y.data();
  run_fp32(conv);
  parallel_for(outputs, kGrain, [&](int64_t begin, int64_t end) {
    LW_SELECT(conv_narrow)(wide_y.data() + begin, end - begin, y + begin);
  });
}

}  // namespace liveweight
#endif  // LW_BASE
