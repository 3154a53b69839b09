// One wrapper per PTX instruction: the instruction on the device, its meaning in C++ elsewhere.
//
// The second half is what the host emulator of tests/cuda_host executes. It is our reading of the
// PTX manual, so each wrapper is also compared with the real instruction by a GPU test.
#pragma once

#include <cstdint>
#include <cstring>

namespace liveweight::cuda {

// 16 bytes, the widest single load.
struct alignas(16) Vector16 {
  uint32_t word[4];
};

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

__host__ __device__ inline float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// ld.global.nc.L1::no_allocate.v4.u32: read-only data that is used once and must not evict others.
__host__ __device__ inline Vector16 load_streaming(const void* address) {
#if defined(__CUDA_ARCH__)
  Vector16 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(address));
  return v;
#else
  return *static_cast<const Vector16*>(address);
#endif
}

// max.NaN.f32: NaN if either side is NaN (fmaxf would drop it).
__host__ __device__ inline float max_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
#else
  return a != a || a > b ? a : b;
#endif
}

// No instruction does this in double precision.
__host__ __device__ inline double max_nan(double a, double b) { return a != a || a > b ? a : b; }

// set.gt.f32.f32: 1 if a > b else 0 (also for NaN), as a float: counting takes two instructions.
__host__ __device__ inline float greater(float a, float b) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("set.gt.f32.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
#else
  return a > b ? 1.f : 0.f;
#endif
}

__host__ __device__ inline float to_float(float value) { return value; }

__host__ __device__ inline float to_float(Bf16 value) {
  return bits_to_float(uint32_t(value.bits) << 16);
}

// cvt.f32.f16
__host__ __device__ inline float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value.bits));
  return out;
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t exponent = value.bits >> 10 & 31u;
  const uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent) return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
  const float subnormal = float(mantissa) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
#endif
}

// The elements of a 16-byte vector, widened; a template per element type.
__host__ __device__ inline void widen(Vector16 v, float (&out)[4], float) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = bits_to_float(v.word[i]);
}

__host__ __device__ inline void widen(Vector16 v, float (&out)[8], Bf16) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = bits_to_float(v.word[i] << 16);
    out[2 * i + 1] = bits_to_float(v.word[i] & 0xffff0000u);
  }
}

__host__ __device__ inline void widen(Vector16 v, float (&out)[8], Half) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = to_float(Half{uint16_t(v.word[i])});
    out[2 * i + 1] = to_float(Half{uint16_t(v.word[i] >> 16)});
  }
}

}  // namespace liveweight::cuda
