// Functions and types of CUDA C++ that need no other thread: atomics, bits, vectors, rounding.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// Fibres switch only at collectives, so a plain read-modify-write is atomic. The value has a type
// of its own, as the device's overloads convert it.
#define LW_ATOMIC(name, result)                                        \
  template <typename T>                                                \
  inline T name(T* address, std::type_identity_t<T> value) {           \
    const T old = *address;                                            \
    *address = T(result);                                              \
    return old;                                                        \
  }
LW_ATOMIC(atomicAdd, old + value)
LW_ATOMIC(atomicSub, old - value)
LW_ATOMIC(atomicMax, std::max(old, value))
LW_ATOMIC(atomicMin, std::min(old, value))
LW_ATOMIC(atomicAnd, old & value)
LW_ATOMIC(atomicOr, old | value)
LW_ATOMIC(atomicXor, old ^ value)
LW_ATOMIC(atomicExch, value)
#undef LW_ATOMIC

template <typename T>
inline T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
inline T __ldg(const T* address) {
  return *address;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned out = 0;
  for (int i = 0; i < 32; ++i) out |= (x >> i & 1u) << (31 - i);
  return out;
}

// Four bytes of {b, a}, one per nibble of the selector; its bit 3 copies the sign instead.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> 4 * i & 15;
    unsigned byte = unsigned(both >> 8 * (nibble & 7)) & 255u;
    if (nibble & 8) byte = byte & 128 ? 255u : 0u;
    out |= byte << 8 * i;
  }
  return out;
}

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return unsigned(((uint64_t(high) << 32 | low) << (by & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return unsigned((uint64_t(high) << 32 | low) >> (by & 31));
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }

template <typename To, typename From>
inline To lw_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}
inline float __uint_as_float(unsigned x) { return lw_bits<float>(x); }
inline float __int_as_float(int x) { return lw_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return lw_bits<unsigned>(x); }
inline int __float_as_int(float x) { return lw_bits<int>(x); }
inline long long __double_as_longlong(double x) { return lw_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return lw_bits<double>(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }

// As the device's overloads: numbers of different types meet in their common type, NaN loses.
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
  return T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}

#define LW_VECTOR(type, scalar)                                                             \
  struct alignas(2 * sizeof(scalar)) type##2 { scalar x, y; };                              \
  struct type##3 { scalar x, y, z; };                                                       \
  struct alignas(4 * sizeof(scalar)) type##4 { scalar x, y, z, w; };                        \
  inline type##2 make_##type##2(scalar x, scalar y) { return {x, y}; }                      \
  inline type##3 make_##type##3(scalar x, scalar y, scalar z) { return {x, y, z}; }         \
  inline type##4 make_##type##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
LW_VECTOR(int, int)
LW_VECTOR(uint, unsigned)
LW_VECTOR(float, float)
LW_VECTOR(short, short)
LW_VECTOR(ushort, unsigned short)
#undef LW_VECTOR
struct alignas(16) double2 {
  double x, y;
};
inline double2 make_double2(double x, double y) { return {x, y}; }
