// Activations fused behind a sum: ReLU, exact GELU and its tanh form, on Vec and on Lanes<N>.
//
//   gelu(x) = x * Phi(x), Phi the normal distribution function
//   gelu_tanh(x) = x / (1 + exp(-2u)), u = sqrt(2 / pi) * (x + 0.044715 x^3)
//
// Phi comes from its upper tail Q(a) = exp(-a^2 / 2) * R(a), so that nothing cancels where x is very
// negative: relative error below 1e-6 for all x, while 1 + erf(x / sqrt(2)) has lost every digit at
// x = -6. Results below 1e-37 may be 0. NaN gives NaN, and so does -inf in both forms of GELU, as in
// PyTorch.
#pragma once

#include "lanes.h"

namespace liveweight {

// As ops/activation.py numbers them.
enum Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kActivations = 4 };

}  // namespace liveweight

namespace liveweight::LW_ISA {

// e^(high + low) for high + low <= 0, low small beside high; 0 where the result is below 1e-38.
template <class V>
LW_INLINE V exp_nonpositive(const V& high, const V& low) {
  typedef decltype(high > low) Bits;
  constexpr float kLog2e = 1.44269504f;
  constexpr float kLn2 = 0x1.63p-1f, kLn2Rest = -0x1.bd0105p-13f;  // n * kLn2 is exact
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest whole number in the low bits
  const V limited = high < -88.0f ? V{} - 88.0f : high;
  const V shifted = (limited + low) * kLog2e + kRound;
  const V n = shifted - kRound;
  const V r = (limited - n * kLn2) + (low - n * kLn2Rest);
  // Least greatest relative error on |r| <= 0.35: 2e-9.
  V sum = r * 1.38358132e-3f + 8.37563537e-3f;
  sum = sum * r + 4.16682884e-2f;
  sum = sum * r + 1.66664109e-1f;
  sum = sum * r + 4.99999911e-1f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  return sum * V((Bits(shifted) - (0x4b400000 - 127)) << 23);  // times 2^n
}

template <class V>
LW_INLINE V clamped_abs(const V& x) {
  const V a = x < 0.0f ? -x : x;
  return a > 20.0f ? V{} + 20.0f : a;
}

// 1 - Phi(a) for 0 <= a <= 20.
template <class V>
LW_INLINE V normal_tail(const V& a) {
  typedef decltype(a > a) Bits;
  // The square of 12 leading bits is exact; the exponential would magnify a rounding of a^2 by a^2.
  const V lead = V(Bits(a) & ~0xfff);
  const V e = exp_nonpositive(lead * lead * -0.5f, (a - lead) * (a + lead) * -0.5f);
  // R(a) = t * polynomial(t), least greatest relative error on [0, 20]: 6e-9.
  const V t = 1.0f / (a * 0.3f + 1.0f);
  V sum = t * -1.99823100e-2f + 1.09178126e-1f;
  sum = sum * t - 2.21093729e-1f;
  sum = sum * t + 1.83023810e-1f;
  sum = sum * t - 7.27569759e-2f;
  sum = sum * t + 9.29142088e-2f;
  sum = sum * t + 7.93944299e-2f;
  sum = sum * t + 1.10044777e-1f;
  sum = sum * t + 1.19591855e-1f;
  sum = sum * t + 1.19685799e-1f;
  return sum * t * e;
}

template <class V>
LW_INLINE V relu_lanes(const V& x) {
  return x < 0.0f ? V{} : x;
}

template <class V>
LW_INLINE V gelu_lanes(const V& x) {
  const V tail = normal_tail(clamped_abs(x));
  return x * (x > 0.0f ? 1.0f - tail : tail);
}

template <class V>
LW_INLINE V gelu_tanh_lanes(const V& x) {
  constexpr float kScale = 1.59576912f, kCubic = 0.0713548163f;  // 2 sqrt(2 / pi), that * 0.044715
  const V a = clamped_abs(x);
  const V e = exp_nonpositive(a * (a * a * -kCubic - kScale), V{});
  return x * ((x > 0.0f ? V{} + 1.0f : e) / (e + 1.0f));
}

template <class V>
LW_INLINE V activate_whole(const V& x, int code) {
  if (code == kRelu) return relu_lanes(x);
  if (code == kGelu) return gelu_lanes(x);
  if (code == kGeluTanh) return gelu_tanh_lanes(x);
  return x;
}

// act(x); the code is one of enum Activation.
template <class V>
LW_INLINE V activate_lanes(const V& x, int code) {
  if constexpr (sizeof(V) <= kLanes * sizeof(float)) {
    return activate_whole(x, code);
  } else {  // register by register: the compiler splits a comparison of more into single numbers
    typedef Lanes<kLanes> Part;
    Part parts[sizeof(V) / sizeof(Part)];
    __builtin_memcpy(parts, &x, sizeof x);
    for (Part& part : parts) part = activate_whole(part, code);
    V y;
    __builtin_memcpy(&y, parts, sizeof y);
    return y;
  }
}

LW_INLINE Vec gelu(Vec x) { return {gelu_lanes<Lanes<kLanes>>(x.v)}; }
LW_INLINE Vec gelu_tanh(Vec x) { return {gelu_tanh_lanes<Lanes<kLanes>>(x.v)}; }
LW_INLINE Vec activate(Vec x, int code) { return {activate_lanes<Lanes<kLanes>>(x.v, code)}; }
LW_INLINE float activate(float x, int code) {
  return activate_lanes<Lanes<4>>(Lanes<4>{x, x, x, x}, code)[0];
}

}  // namespace liveweight::LW_ISA
