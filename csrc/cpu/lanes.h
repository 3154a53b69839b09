// fp32 vectors of a chosen length, whatever the instruction set: Lanes<4>, Lanes<8>, Lanes<16>.
//
// Vec (simd.h) has the machine's own length; kernels whose tile is fixed by the data, say 8 samples
// or 4 x 4 numbers, use these. The compiler splits what is longer than a register.
#pragma once

#include "simd.h"

// Everything here is inlined: no vector is ever passed by a calling convention.
#pragma GCC diagnostic ignored "-Wpsabi"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define LW_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#endif
#endif
#ifndef LW_SHUFFLE  // GCC before 12
#define LW_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, LaneNumbers{i, j, k, l})
#endif

namespace liveweight::LW_ISA {

template <int N>
struct LanesOf {
  typedef float type __attribute__((vector_size(N * sizeof(float))));
};
template <int N>
using Lanes = typename LanesOf<N>::type;
typedef int32_t LaneNumbers __attribute__((vector_size(16)));

template <int N>
LW_INLINE Lanes<N> load_lanes(const float* p) {
  Lanes<N> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <int N>
LW_INLINE void store_lanes(float* p, const Lanes<N>& v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Larger of two numbers; NaN when either is.
template <class T>
LW_INLINE T max_or_nan(const T& a, const T& b) {
  return ((b > a) | (b != b)) ? b : a;
}

// v[i][j] becomes v[j][i].
LW_INLINE void transpose4(Lanes<4> (&v)[4]) {
  const Lanes<4> low01 = LW_SHUFFLE(v[0], v[1], 0, 4, 1, 5), high01 = LW_SHUFFLE(v[0], v[1], 2, 6, 3, 7);
  const Lanes<4> low23 = LW_SHUFFLE(v[2], v[3], 0, 4, 1, 5), high23 = LW_SHUFFLE(v[2], v[3], 2, 6, 3, 7);
  v[0] = LW_SHUFFLE(low01, low23, 0, 1, 4, 5);
  v[1] = LW_SHUFFLE(low01, low23, 2, 3, 6, 7);
  v[2] = LW_SHUFFLE(high01, high23, 0, 1, 4, 5);
  v[3] = LW_SHUFFLE(high01, high23, 2, 3, 6, 7);
}

}  // namespace liveweight::LW_ISA
