// Vec for AVX2 with FMA and F16C. See simd.h for the meaning of the names.
#pragma once

namespace liveweight::LW_ISA {

constexpr int kLanes = 8;
constexpr int kRegisters = 16;

struct Vec {
  __m256 v;
};
struct Mask {
  __m256i m;
};

LW_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
LW_INLINE Vec broadcast(float s) { return {_mm256_set1_ps(s)}; }

LW_INLINE __m256i lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
LW_INLINE Mask mask_from_bits(uint32_t b) {
  const __m256i bit = _mm256_sllv_epi32(_mm256_set1_epi32(1), lane_numbers());
  return {_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(b)), bit), bit)};
}
LW_INLINE Mask first(int n) { return {_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane_numbers())}; }
LW_INLINE uint32_t bits(Mask mask) {
  return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(mask.m)));
}

LW_INLINE Vec widen(__m128i raw, Bf16) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16))};
}
LW_INLINE Vec widen(__m128i raw, Half) { return {_mm256_cvtph_ps(raw)}; }

LW_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
LW_INLINE Vec load(const float* p, Mask mask) { return {_mm256_maskload_ps(p, mask.m)}; }
template <class T>
LW_INLINE Vec load(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
LW_INLINE Vec load_first(const float* p, int n) { return load(p, first(n)); }
template <class T>
LW_INLINE Vec load_first(const T* p, int n) {
  T copy[kLanes] = {};
  __builtin_memcpy(copy, p, size_t(n) * sizeof(T));
  return load(copy);
}

LW_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v.v); }
LW_INLINE void store(float* p, Vec v, Mask mask) { _mm256_maskstore_ps(p, mask.m, v.v); }
LW_INLINE void store_first(float* p, Vec v, int n) { store(p, v, first(n)); }

LW_INLINE void store(Bf16* p, Vec v) {
  const __m256i raw = _mm256_castps_si256(v.v), high = _mm256_srli_epi32(raw, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(raw, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v.v, v.v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i wide = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), quiet, nan);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(halves));
}
LW_INLINE void store_first(Bf16* p, Vec v, int n) {
  Bf16 copy[kLanes];
  store(copy, v);
  __builtin_memcpy(p, copy, size_t(n) * sizeof(Bf16));
}

LW_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
LW_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
LW_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
LW_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
LW_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
LW_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
LW_INLINE Vec abs(Vec v) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v.v)}; }

LW_INLINE Mask greater(Vec a, Vec b) {
  return {_mm256_castps_si256(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))};
}
LW_INLINE Vec select(Mask mask, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(mask.m))};
}
LW_INLINE Vec count_greater(Vec count, Vec v, Vec limit) {
  const __m256 yes = _mm256_castsi256_ps(greater(v, limit).m);
  return {_mm256_add_ps(count.v, _mm256_and_ps(yes, _mm256_set1_ps(1.0f)))};
}

LW_INLINE Vec gather(const float* base, const int32_t* index) {
  const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
  return {_mm256_i32gather_ps(base, at, 4)};
}
LW_INLINE Vec gather(const float* base, const int32_t* index, int n) {
  const __m256i m = first(n).m;
  const __m256i at = _mm256_maskload_epi32(index, m);
  return {_mm256_mask_i32gather_ps(_mm256_setzero_ps(), base, at, _mm256_castsi256_ps(m), 4)};
}
LW_INLINE Vec gather(const float* base, const uint8_t* index) {
  const __m128i at = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(index));
  return {_mm256_i32gather_ps(base, _mm256_cvtepu8_epi32(at), 4)};
}
LW_INLINE Vec gather(const float* base, const uint16_t* index) {
  const __m128i at = _mm_loadu_si128(reinterpret_cast<const __m128i*>(index));
  return {_mm256_i32gather_ps(base, _mm256_cvtepu16_epi32(at), 4)};
}
template <class Index>
LW_INLINE Vec gather(const float* base, const Index* index, int n) {
  int32_t wide[8] = {};
  for (int lane = 0; lane < n; ++lane) wide[lane] = index[lane];
  return gather(base, wide, n);
}

// Row b: for each lane the number of set bits of b below it (its place among the packed values).
struct ExpandTable {
  uint8_t place[256][8];
  constexpr ExpandTable() : place() {
    for (int b = 0; b < 256; ++b) {
      uint8_t used = 0;
      for (int lane = 0; lane < 8; ++lane) {
        place[b][lane] = used;
        used = uint8_t(used + (b >> lane & 1));
      }
    }
  }
};
alignas(64) static constexpr ExpandTable kExpand;

// Lane l gets the next value of p when bit l is set, else 0; reads popcount(b) values.
template <class T>
LW_INLINE Vec expand_load(const T* p, uint32_t b) {
  const Vec packed = load_first(p, __builtin_popcount(b & 255));
  const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand.place[b & 255]));
  const __m256 spread = _mm256_permutevar8x32_ps(packed.v, _mm256_cvtepu8_epi32(places));
  return {_mm256_and_ps(spread, _mm256_castsi256_ps(mask_from_bits(b).m))};
}

LW_INLINE Vec with_previous(Vec v, Vec before) {
  const __m256 middle = _mm256_permute2f128_ps(before.v, v.v, 0x21);
  return {_mm256_castsi256_ps(_mm256_alignr_epi8(_mm256_castps_si256(v.v), _mm256_castps_si256(middle), 12))};
}
LW_INLINE Vec with_next(Vec v, Vec after) {
  const __m256 middle = _mm256_permute2f128_ps(v.v, after.v, 0x21);
  return {_mm256_castsi256_ps(_mm256_alignr_epi8(_mm256_castps_si256(middle), _mm256_castps_si256(v.v), 4))};
}

LW_INLINE float reduce_add(Vec v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v.v), _mm256_extractf128_ps(v.v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
LW_INLINE float reduce_max(Vec v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v.v), _mm256_extractf128_ps(v.v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace liveweight::LW_ISA
