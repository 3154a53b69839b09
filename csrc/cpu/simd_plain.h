// Vec for any CPU, over the compiler's own 4-lane vectors. See simd.h for the meaning of the names.
#pragma once

namespace liveweight::LW_ISA {

constexpr int kLanes = 4;
constexpr int kRegisters = 16;

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

struct Vec {
  Float4 v;
};
struct Mask {
  Int4 m;
};

LW_INLINE float to_float(float value);
LW_INLINE float to_float(Bf16 value);
LW_INLINE float to_float(Half value);

LW_INLINE Vec zero() { return {Float4{0, 0, 0, 0}}; }
LW_INLINE Vec broadcast(float s) { return {Float4{s, s, s, s}}; }

LW_INLINE Mask mask_from_bits(uint32_t b) {
  return {-Int4{int32_t(b & 1), int32_t(b >> 1 & 1), int32_t(b >> 2 & 1), int32_t(b >> 3 & 1)}};
}
LW_INLINE Mask first(int n) { return {Int4{0, 1, 2, 3} < Int4{n, n, n, n}}; }
LW_INLINE uint32_t bits(Mask mask) {
  return uint32_t((mask.m[0] & 1) | (mask.m[1] & 2) | (mask.m[2] & 4) | (mask.m[3] & 8));
}

LW_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
LW_INLINE Vec load(const T* p) {
  return {Float4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
LW_INLINE Vec load(const float* p, Mask mask) {
  Vec v = zero();
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask.m[lane]) v.v[lane] = p[lane];
  }
  return v;
}
template <class T>
LW_INLINE Vec load_first(const T* p, int n) {
  Vec v = zero();
  for (int lane = 0; lane < n; ++lane) v.v[lane] = to_float(p[lane]);
  return v;
}

LW_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
LW_INLINE void store(float* p, Vec v, Mask mask) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask.m[lane]) p[lane] = v.v[lane];
  }
}
LW_INLINE void store_first(float* p, Vec v, int n) { __builtin_memcpy(p, &v, size_t(n) * 4); }

LW_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
LW_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
LW_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
LW_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
LW_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
LW_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
LW_INLINE Vec abs(Vec v) { return {Float4(Int4(v.v) & 0x7fffffff)}; }

LW_INLINE Mask greater(Vec a, Vec b) { return {a.v > b.v}; }
LW_INLINE Vec select(Mask mask, Vec a, Vec b) { return {mask.m ? a.v : b.v}; }
LW_INLINE Vec count_greater(Vec count, Vec v, Vec limit) {
  return count + Vec{Float4(greater(v, limit).m & Int4(broadcast(1.0f).v))};
}

template <class Index>
LW_INLINE Vec gather(const float* base, const Index* index) {
  return {Float4{base[index[0]], base[index[1]], base[index[2]], base[index[3]]}};
}
template <class Index>
LW_INLINE Vec gather(const float* base, const Index* index, int n) {
  Vec v = zero();
  for (int lane = 0; lane < n; ++lane) v.v[lane] = base[index[lane]];
  return v;
}
// Lane l gets the next value of p when bit l is set, else 0; reads popcount(b) values.
template <class T>
LW_INLINE Vec expand_load(const T* p, uint32_t b) {
  Vec v = zero();
  for (int lane = 0; lane < kLanes; ++lane) {
    if (b >> lane & 1) v.v[lane] = to_float(*p++);
  }
  return v;
}

LW_INLINE Vec with_previous(Vec v, Vec before) {
  return {__builtin_shuffle(before.v, v.v, Int4{3, 4, 5, 6})};
}
LW_INLINE Vec with_next(Vec v, Vec after) { return {__builtin_shuffle(v.v, after.v, Int4{1, 2, 3, 4})}; }

LW_INLINE float reduce_add(Vec v) { return (v.v[0] + v.v[2]) + (v.v[1] + v.v[3]); }
LW_INLINE float reduce_max(Vec v) {
  const float even = v.v[0] > v.v[2] ? v.v[0] : v.v[2];
  const float odd = v.v[1] > v.v[3] ? v.v[1] : v.v[3];
  return even > odd ? even : odd;
}

}  // namespace liveweight::LW_ISA
