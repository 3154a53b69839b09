// fp32 vectors in three widths behind one set of names.
//
// Vec holds kLanes floats: 16 with AVX-512, 8 with AVX2, 4 elsewhere (compiler vectors).
// Everything lives in liveweight::LW_ISA and is force-inlined, so that no copy compiled for one
// instruction set can be picked by the linker for another. Include no std templates beside it.
//
//   zero() broadcast(s)            load(p) load_first(p, n)     store(p, v) store_first(p, v, n)
//   first(n) mask_from_bits(b)     load(p, mask)                store(p, v, mask)  bits(mask)
//   + - * fma(a, b, c) = a * b + c   fma(a, b, c, mask): c where the mask is not set
//   max(a, b) min(a, b) abs(v) relu(v)
//   greater(a, b) select(mask, a, b) count_greater(count, v, limit) = count + (v > limit)
//   gather(base, index) gather(base, index, n)    expand_load(p, bits)   index: int32, uint16, uint8
//   with_previous(v, before): lane l - 1 of v, before lane 0 the last of `before`; with_next(v, after)
//   reduce_add(v) reduce_max(v)    popcount(bits) prefetch(p)
//
// load and load_first also take Bf16 and Half, expand_load also Bf16, and widen to fp32; store and store_first also take Bf16
// and round to the nearest, ties to even. Where n lanes are asked for, n is
// in [0, kLanes], no byte past them is touched and the other lanes are 0. max and min return b
// when either side is NaN (as x86 does); relu keeps NaN.
#pragma once

#include <stddef.h>

#include <cstdint>

#if defined(__AVX2__)
// GCC 12 takes the deliberately undefined registers of its own intrinsics for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define LW_INLINE static inline __attribute__((always_inline))

namespace liveweight {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

}  // namespace liveweight

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_plain.h"
#endif

namespace liveweight::LW_ISA {

LW_INLINE Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
LW_INLINE Vec relu(Vec v) { return max(zero(), v); }
LW_INLINE int popcount(uint32_t bits) { return __builtin_popcount(bits); }
LW_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

LW_INLINE float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

LW_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Nearest bf16, ties to even; NaN stays NaN.
LW_INLINE Bf16 to_bf16(float value) {
  const uint32_t raw = float_to_bits(value);
  if (value != value) return {uint16_t(raw >> 16 | 0x40)};
  return {uint16_t((raw + 0x7fff + (raw >> 16 & 1)) >> 16)};
}

LW_INLINE float to_float(float value) { return value; }
LW_INLINE float to_float(Bf16 value) { return bits_to_float(uint32_t(value.bits) << 16); }
LW_INLINE float to_float(Half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Halves, subnormal ones too, are exact multiples of 2^-24 after this shift of the exponent.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

#if !defined(__AVX512F__)
LW_INLINE Vec fma(Vec a, Vec b, Vec c, Mask mask) { return select(mask, fma(a, b, c), c); }
#endif
#if !defined(__AVX2__)
LW_INLINE void store_first(Bf16* p, Vec v, int n) {
  for (int lane = 0; lane < n; ++lane) p[lane] = to_bf16(v.v[lane]);
}
LW_INLINE void store(Bf16* p, Vec v) { store_first(p, v, kLanes); }
#endif

}  // namespace liveweight::LW_ISA
