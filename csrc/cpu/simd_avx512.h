// Vec for AVX-512 (F, BW, VL, DQ). See simd.h for the meaning of the names.
#pragma once

namespace liveweight::LW_ISA {

constexpr int kLanes = 16;
constexpr int kRegisters = 32;

struct Vec {
  __m512 v;
};
struct Mask {
  __mmask16 m;
};

LW_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
LW_INLINE Vec broadcast(float s) { return {_mm512_set1_ps(s)}; }

LW_INLINE Mask mask_from_bits(uint32_t b) { return {static_cast<__mmask16>(b)}; }
LW_INLINE Mask first(int n) { return mask_from_bits((1u << n) - 1); }
LW_INLINE uint32_t bits(Mask mask) { return mask.m; }

LW_INLINE Vec widen(__m256i raw, Bf16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
LW_INLINE Vec widen(__m256i raw, Half) { return {_mm512_cvtph_ps(raw)}; }

LW_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
LW_INLINE Vec load(const float* p, Mask mask) { return {_mm512_maskz_loadu_ps(mask.m, p)}; }
template <class T>
LW_INLINE Vec load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
LW_INLINE Vec load_first(const float* p, int n) { return load(p, first(n)); }
template <class T>
LW_INLINE Vec load_first(const T* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(first(n).m, p), T{});
}

LW_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v.v); }
LW_INLINE void store(float* p, Vec v, Mask mask) { _mm512_mask_storeu_ps(p, mask.m, v.v); }
LW_INLINE void store_first(float* p, Vec v, int n) { store(p, v, first(n)); }

LW_INLINE __m256i round_to_bf16(Vec v) {
  const __m512i raw = _mm512_castps_si512(v.v), high = _mm512_srli_epi32(raw, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(raw, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v.v, v.v, _CMP_UNORD_Q);
  const __m512i nearest = _mm512_srli_epi32(up, 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(nearest, nan, high, _mm512_set1_epi32(0x40)));
}
LW_INLINE void store(Bf16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to_bf16(v));
}
LW_INLINE void store_first(Bf16* p, Vec v, int n) {
  _mm256_mask_storeu_epi16(p, first(n).m, round_to_bf16(v));
}

LW_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
LW_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
LW_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
LW_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
LW_INLINE Vec fma(Vec a, Vec b, Vec c, Mask mask) {
  return {_mm512_mask3_fmadd_ps(a.v, b.v, c.v, mask.m)};
}
LW_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
LW_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
LW_INLINE Vec abs(Vec v) { return {_mm512_abs_ps(v.v)}; }

LW_INLINE Mask greater(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
LW_INLINE Vec select(Mask mask, Vec a, Vec b) { return {_mm512_mask_blend_ps(mask.m, b.v, a.v)}; }
LW_INLINE Vec count_greater(Vec count, Vec v, Vec limit) {
  return {_mm512_mask_add_ps(count.v, greater(v, limit).m, count.v, _mm512_set1_ps(1.0f))};
}

LW_INLINE Vec gather(const float* base, const int32_t* index) {
  return {_mm512_i32gather_ps(_mm512_loadu_si512(index), base, 4)};
}
LW_INLINE Vec gather(const float* base, const int32_t* index, int n) {
  const __mmask16 m = first(n).m;
  const __m512i at = _mm512_maskz_loadu_epi32(m, index);
  return {_mm512_mask_i32gather_ps(_mm512_setzero_ps(), m, at, base, 4)};
}
LW_INLINE __m512i widen_index(__m128i index) { return _mm512_cvtepu8_epi32(index); }
LW_INLINE __m512i widen_index(__m256i index) { return _mm512_cvtepu16_epi32(index); }
LW_INLINE Vec gather(const float* base, const uint8_t* index) {
  const __m128i at = _mm_loadu_si128(reinterpret_cast<const __m128i*>(index));
  return {_mm512_i32gather_ps(widen_index(at), base, 4)};
}
LW_INLINE Vec gather(const float* base, const uint16_t* index) {
  const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
  return {_mm512_i32gather_ps(widen_index(at), base, 4)};
}
LW_INLINE Vec gather(const float* base, const uint8_t* index, int n) {
  const __mmask16 m = first(n).m;
  const __m512i at = widen_index(_mm_maskz_loadu_epi8(m, index));
  return {_mm512_mask_i32gather_ps(_mm512_setzero_ps(), m, at, base, 4)};
}
LW_INLINE Vec gather(const float* base, const uint16_t* index, int n) {
  const __mmask16 m = first(n).m;
  const __m512i at = widen_index(_mm256_maskz_loadu_epi16(m, index));
  return {_mm512_mask_i32gather_ps(_mm512_setzero_ps(), m, at, base, 4)};
}
// Lane l gets the next value of p when bit l is set, else 0; reads popcount(b) values.
LW_INLINE Vec expand_load(const float* p, uint32_t b) {
  return {_mm512_maskz_expandloadu_ps(static_cast<__mmask16>(b), p)};
}
LW_INLINE Vec expand_load(const Bf16* p, uint32_t b) {
  const Vec packed = load_first(p, __builtin_popcount(b));
  return {_mm512_maskz_expand_ps(static_cast<__mmask16>(b), packed.v)};
}

LW_INLINE Vec with_previous(Vec v, Vec before) {
  return {_mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(v.v), _mm512_castps_si512(before.v), 15))};
}
LW_INLINE Vec with_next(Vec v, Vec after) {
  return {_mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(after.v), _mm512_castps_si512(v.v), 1))};
}

LW_INLINE float reduce_add(Vec v) { return _mm512_reduce_add_ps(v.v); }
LW_INLINE float reduce_max(Vec v) { return _mm512_reduce_max_ps(v.v); }

}  // namespace liveweight::LW_ISA
