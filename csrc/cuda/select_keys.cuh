// Scores as unsigned keys that order like them, and the rules that a selection follows.
//
// A selection walks from the largest key down and adds up what each element weighs until a target
// is reached: its score (mass_mask) or 1 (top_k_mask). Key 0 stands for "no element". It is what
// places past the end of a row hold, and zeros under the mass rule, which never keeps one.
#pragma once

#include <cstdint>
#include <cstring>

#include "ptx.cuh"

namespace liveweight::cuda {

__host__ __device__ inline uint32_t float_to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

__host__ __device__ inline uint64_t double_to_bits(double value) {
#if defined(__CUDA_ARCH__)
  return uint64_t(__double_as_longlong(value));
#else
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

__host__ __device__ inline double bits_to_double(uint64_t bits) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(int64_t(bits));
#else
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// The exact sum of `count` floats whose bit patterns are base + offset, all of one exponent, from
// the sum of the offsets: a float is base + offset * ulp. Exact in double up to 2^29 floats.
__device__ inline double sum_of_floats(uint32_t base, double count, double offsets) {
  const uint32_t exponent = base >> 23 ? base >> 23 : 1;
  const double ulp = bits_to_double(uint64_t(exponent + 873) << 52);  // 2^(exponent - 150)
  return count * double(bits_to_float(base)) + offsets * ulp;
}

// The smallest double that is >= float(alpha) * float(total) once it is rounded to float: the
// authors' program compares sums in float32.
__device__ inline double authors_target(double alpha, double total) {
  const float limit = float(alpha) * float(total);
  if (!(limit > 0)) return 0;  // NaN too, 0 * inf: no sum is below it
  if (limit > 3.40282347e38f) return 0x1.ffffffp127;  // where rounding to float gives inf
  const double below = bits_to_float(float_to_bits(limit) - 1);
  const double middle = 0.5 * (below + double(limit));
  return float(middle) >= limit ? middle : bits_to_double(double_to_bits(middle) + 1);
}

// Keep the smallest set that holds a share alpha of the row's sum.
struct ByMass {
  static constexpr bool kMass = true;
  static constexpr uint32_t kLargest = 0x7f7fffffu;  // of a valid score; negative, inf, NaN: above
  double alpha;
  bool authors;

  __device__ static uint32_t key(uint32_t bits) {
    return bits == 0x80000000u ? 0 : bits;  // -0 is 0
  }
  __device__ double target(double total) const {
    return authors ? authors_target(alpha, total) : alpha * total;
  }
  __device__ bool nothing() const { return alpha == 0 && !authors; }
  __device__ bool everything() const { return alpha == 1 && !authors; }
};

// Keep the k largest; any number but NaN, -0 like 0.
struct ByCount {
  static constexpr bool kMass = false;
  static constexpr uint32_t kLargest = 0xff800000u;  // +inf
  static constexpr bool authors = false;
  int64_t k;

  __device__ static uint32_t key(uint32_t bits) {
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;
    return bits >> 31 && bits != 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  __device__ double target(double) const { return double(k); }
  __device__ bool nothing() const { return k == 0; }
  __device__ bool everything() const { return false; }
};

// The same order for double, of the flat selection.
__device__ inline uint32_t count_key(float score) { return ByCount::key(float_to_bits(score)); }
__device__ inline uint64_t count_key(double score) {
  const uint64_t bits = double_to_bits(score), sign = uint64_t(1) << 63;
  if ((bits & ~sign) > uint64_t(0x7ff) << 52) return ~uint64_t(0);
  return bits & sign && bits != sign ? ~bits : bits | sign;
}

}  // namespace liveweight::cuda
