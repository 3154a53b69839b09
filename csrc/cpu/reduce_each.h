// Sums of kLanes vectors at once: lane i of the result is the sum of the lanes of vector i.
//
// Each level adds the halves of two vectors and keeps both sums in one: kLanes - 1 additions in all
// where kLanes horizontal sums would take kLanes * log2(kLanes).
#pragma once

#include "lanes.h"

namespace liveweight::LW_ISA {

#if defined(__AVX512F__)

// [a low + a high | b low + b high] in halves, then the same inside 256, 128 and 64 bits.
LW_INLINE Vec add_halves(Vec a, Vec b) {
  const __m512 kept = _mm512_mask_blend_ps(0xff00, a.v, b.v);
  return {_mm512_add_ps(kept, _mm512_shuffle_f32x4(a.v, b.v, 0x4e))};
}
LW_INLINE Vec add_quarters(Vec a, Vec b) {
  const __m512 kept = _mm512_mask_blend_ps(0xf0f0, a.v, b.v);
  const __m512i at = _mm512_setr_epi64(2, 3, 8, 9, 6, 7, 12, 13);
  const __m512d moved = _mm512_permutex2var_pd(_mm512_castps_pd(a.v), at, _mm512_castps_pd(b.v));
  return {_mm512_add_ps(kept, _mm512_castpd_ps(moved))};
}
LW_INLINE Vec add_pairs(Vec a, Vec b) {
  const __m512 kept = _mm512_mask_blend_ps(0xcccc, a.v, b.v);
  return {_mm512_add_ps(kept, _mm512_shuffle_ps(a.v, b.v, 0x4e))};
}
LW_INLINE Vec add_neighbours(Vec a, Vec b) {
  return {_mm512_add_ps(_mm512_shuffle_ps(a.v, b.v, 0x88), _mm512_shuffle_ps(a.v, b.v, 0xdd))};
}

template <class Part>
LW_INLINE Vec four_of(const Part& part, int i) {
  return add_quarters(add_halves(part(i), part(i + 8)), add_halves(part(i + 4), part(i + 12)));
}

#elif defined(__AVX2__)

LW_INLINE Vec add_pairs(Vec a, Vec b) {
  const __m256 kept = _mm256_blend_ps(a.v, b.v, 0xcc);
  return {_mm256_add_ps(kept, _mm256_shuffle_ps(a.v, b.v, 0x4e))};
}
LW_INLINE Vec add_neighbours(Vec a, Vec b) {
  return {_mm256_add_ps(_mm256_shuffle_ps(a.v, b.v, 0x88), _mm256_shuffle_ps(a.v, b.v, 0xdd))};
}

template <class Part>
LW_INLINE Vec four_of(const Part& part, int i) {
  const Vec a = part(i), b = part(i + 4);
  const __m256 kept = _mm256_blend_ps(a.v, b.v, 0xf0);
  return {_mm256_add_ps(kept, _mm256_permute2f128_ps(a.v, b.v, 0x21))};
}

#else

LW_INLINE Vec add_pairs(Vec a, Vec b) {
  return {LW_SHUFFLE(a.v, b.v, 0, 1, 6, 7) + LW_SHUFFLE(a.v, b.v, 2, 3, 4, 5)};
}
LW_INLINE Vec add_neighbours(Vec a, Vec b) {
  return {LW_SHUFFLE(a.v, b.v, 0, 2, 4, 6) + LW_SHUFFLE(a.v, b.v, 1, 3, 5, 7)};
}

template <class Part>
LW_INLINE Vec four_of(const Part& part, int i) {
  return part(i);
}

#endif

// part(i) returns vector i, 0 <= i < kLanes; asked for once each, in an order that keeps few alive.
template <class Part>
LW_INLINE Vec reduce_each(const Part& part) {
  const Vec low = add_pairs(four_of(part, 0), four_of(part, 1));
  const Vec high = add_pairs(four_of(part, 2), four_of(part, 3));
  return add_neighbours(low, high);
}

}  // namespace liveweight::LW_ISA
