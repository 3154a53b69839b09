// Two vectors of neighbours in memory, and the vectors of their even and their odd numbers.
//
//   split_pairs(a, b, even, odd)   even: lanes 0, 2, ... of a and then of b; odd: lanes 1, 3, ...
//   join_pairs(even, odd, a, b)    undoes it
//   load_halves(p, q)              kLanes / 2 floats of each    store_halves(p, q, v)
#pragma once

#include "lanes.h"

namespace liveweight::LW_ISA {

#if defined(__AVX512F__)
LW_INLINE void split_pairs(Vec a, Vec b, Vec& even, Vec& odd) {
  const __m512i numbers = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even.v = _mm512_permutex2var_ps(a.v, numbers, b.v);
  odd.v = _mm512_permutex2var_ps(a.v, _mm512_or_si512(numbers, _mm512_set1_epi32(1)), b.v);
}
LW_INLINE void join_pairs(Vec even, Vec odd, Vec& a, Vec& b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  a.v = _mm512_permutex2var_ps(even.v, low, odd.v);
  b.v = _mm512_permutex2var_ps(even.v, _mm512_or_si512(low, _mm512_set1_epi32(8)), odd.v);
}
LW_INLINE Vec load_halves(const float* p, const float* q) {
  return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(p)), _mm256_loadu_ps(q), 1)};
}
LW_INLINE void store_halves(float* p, float* q, Vec v) {
  _mm256_storeu_ps(p, _mm512_castps512_ps256(v.v));
  _mm256_storeu_ps(q, _mm512_extractf32x8_ps(v.v, 1));
}
#elif defined(__AVX2__)
LW_INLINE __m256 swap_middle(__m256 v) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xD8));
}
LW_INLINE void split_pairs(Vec a, Vec b, Vec& even, Vec& odd) {
  even.v = swap_middle(_mm256_shuffle_ps(a.v, b.v, 0x88));
  odd.v = swap_middle(_mm256_shuffle_ps(a.v, b.v, 0xDD));
}
LW_INLINE void join_pairs(Vec even, Vec odd, Vec& a, Vec& b) {
  const __m256 low = _mm256_unpacklo_ps(even.v, odd.v), high = _mm256_unpackhi_ps(even.v, odd.v);
  a.v = _mm256_permute2f128_ps(low, high, 0x20);
  b.v = _mm256_permute2f128_ps(low, high, 0x31);
}
LW_INLINE Vec load_halves(const float* p, const float* q) {
  return {_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(q), 1)};
}
LW_INLINE void store_halves(float* p, float* q, Vec v) {
  _mm_storeu_ps(p, _mm256_castps256_ps128(v.v));
  _mm_storeu_ps(q, _mm256_extractf128_ps(v.v, 1));
}
#else
LW_INLINE void split_pairs(Vec a, Vec b, Vec& even, Vec& odd) {
  const Lanes<4> first = a.v, second = b.v;
  even.v = LW_SHUFFLE(first, second, 0, 2, 4, 6);
  odd.v = LW_SHUFFLE(first, second, 1, 3, 5, 7);
}
LW_INLINE void join_pairs(Vec even, Vec odd, Vec& a, Vec& b) {
  const Lanes<4> first = even.v, second = odd.v;
  a.v = LW_SHUFFLE(first, second, 0, 4, 1, 5);
  b.v = LW_SHUFFLE(first, second, 2, 6, 3, 7);
}
LW_INLINE Vec load_halves(const float* p, const float* q) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v / 2);
  __builtin_memcpy(reinterpret_cast<char*>(&v) + sizeof v / 2, q, sizeof v / 2);
  return v;
}
LW_INLINE void store_halves(float* p, float* q, Vec v) {
  __builtin_memcpy(p, &v, sizeof v / 2);
  __builtin_memcpy(q, reinterpret_cast<const char*>(&v) + sizeof v / 2, sizeof v / 2);
}
#endif

}  // namespace liveweight::LW_ISA
