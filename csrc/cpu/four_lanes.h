// Four numbers of each lane as four vectors, one number a vector: a transposition of 4 x kLanes.
//
//   Four v;  set_quarter(v, lane, p): the lane's numbers p[0..3]   get_quarter(v, lane, p): back to p
//   transpose_four(v): between "by lane" (set_quarter, get_quarter) and v.row[i] = number i of all lanes
#pragma once

#include "lanes.h"

namespace liveweight::LW_ISA {

// By lane, row[l % 4] holds lane l in its quarter l / 4 (of four numbers).
struct Four {
  Vec row[4];
};

#if defined(__AVX512F__)
LW_INLINE void set_quarter(Four& v, int lane, const float* p) {
  const __m128 numbers = _mm_loadu_ps(p);
  __m512& row = v.row[lane % 4].v;
  switch (lane / 4) {
    case 0: row = _mm512_castps128_ps512(numbers); break;
    case 1: row = _mm512_insertf32x4(row, numbers, 1); break;
    case 2: row = _mm512_insertf32x4(row, numbers, 2); break;
    default: row = _mm512_insertf32x4(row, numbers, 3);
  }
}
LW_INLINE void get_quarter(const Four& v, int lane, float* p) {
  const __m512 row = v.row[lane % 4].v;
  switch (lane / 4) {
    case 0: _mm_storeu_ps(p, _mm512_castps512_ps128(row)); break;
    case 1: _mm_storeu_ps(p, _mm512_extractf32x4_ps(row, 1)); break;
    case 2: _mm_storeu_ps(p, _mm512_extractf32x4_ps(row, 2)); break;
    default: _mm_storeu_ps(p, _mm512_extractf32x4_ps(row, 3));
  }
}
LW_INLINE void transpose_four(Four& v) {
  const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(v.row[0].v, v.row[1].v));
  const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(v.row[0].v, v.row[1].v));
  const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(v.row[2].v, v.row[3].v));
  const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(v.row[2].v, v.row[3].v));
  v.row[0].v = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
  v.row[1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
  v.row[2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
  v.row[3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
}
#elif defined(__AVX2__)
LW_INLINE void set_quarter(Four& v, int lane, const float* p) {
  const __m128 numbers = _mm_loadu_ps(p);
  __m256& row = v.row[lane % 4].v;
  row = lane < 4 ? _mm256_castps128_ps256(numbers) : _mm256_insertf128_ps(row, numbers, 1);
}
LW_INLINE void get_quarter(const Four& v, int lane, float* p) {
  const __m256 row = v.row[lane % 4].v;
  _mm_storeu_ps(p, lane < 4 ? _mm256_castps256_ps128(row) : _mm256_extractf128_ps(row, 1));
}
LW_INLINE void transpose_four(Four& v) {
  const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(v.row[0].v, v.row[1].v));
  const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(v.row[0].v, v.row[1].v));
  const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(v.row[2].v, v.row[3].v));
  const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(v.row[2].v, v.row[3].v));
  v.row[0].v = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
  v.row[1].v = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
  v.row[2].v = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
  v.row[3].v = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
}
#else
LW_INLINE void set_quarter(Four& v, int lane, const float* p) { v.row[lane] = load(p); }
LW_INLINE void get_quarter(const Four& v, int lane, float* p) { store(p, v.row[lane]); }
LW_INLINE void transpose_four(Four& v) {
  Lanes<4> rows[4];
  for (int i = 0; i < 4; ++i) rows[i] = v.row[i].v;
  transpose4(rows);
  for (int i = 0; i < 4; ++i) v.row[i].v = rows[i];
}
#endif

}  // namespace liveweight::LW_ISA
