// Activations fused behind a sum, numbered as ops/activation.py numbers them.
#pragma once

#include <cmath>

#include "launch.cuh"
#include "ptx.cuh"

namespace liveweight::cuda {

enum Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kActivations = 4 };

// NaN gives NaN, and so does -inf in both forms of GELU, as in PyTorch. Exact GELU takes the normal
// distribution function by erfc, so that no digits cancel where x is very negative.
__device__ inline float activate(float x, int code) {
  if (code == kRelu) return x < 0.f ? 0.f : x;
  if (code == kGelu) return x * (0.5f * erfcf(x * -0.707106781f));
  if (code == kGeluTanh) {
    const float u = 0.797884561f * (x + 0.044715f * x * x * x);
    return x * (0.5f * (1.f + tanhf(u)));
  }
  return x;
}

// y = act(y), elementwise.
template <typename T>
__global__ void __launch_bounds__(256) activate_elements(T* y, int64_t count, int activation) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i < count) y[i] = from_float<T>(activate(to_float(y[i]), activation));
}

template <typename T>
void activate_all(T* y, int64_t count, int activation, const Launch& launch) {
  if (activation == kNone) return;
  launch(activate_elements<T>, Shape{grid((count + 255) / 256), 256}, y, count, activation);
}

}  // namespace liveweight::cuda
