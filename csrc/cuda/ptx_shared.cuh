// What delta_linear is made of: single words from global memory, gathers from shared memory by
// 32-bit addresses, and products that are left out.
#pragma once

#include <cmath>

#include "ptx.cuh"

namespace liveweight::cuda {

// ld.global.nc.L1::no_allocate.u32: the same for one word.
__host__ __device__ inline uint32_t load_word(const uint32_t* address) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(word) : "l"(address));
  return word;
#else
  return *address;
#endif
}

// setp.ne.b32 and @p fma.rn.f32: sum += value * x unless value is -0.0. Without a branch, so that
// loads stay where they stand.
__device__ inline void fma_unless_minus_zero(float value, const float (&x)[1], float (&sum)[1]) {
#if defined(__CUDA_ARCH__)
  asm("{.reg .pred p; setp.ne.b32 p, %1, 0x80000000; @p fma.rn.f32 %0, %1, %2, %0;}"
      : "+f"(sum[0])
      : "f"(value), "f"(x[0]));
#else
  if (value != 0 || !std::signbit(value)) sum[0] = std::fma(value, x[0], sum[0]);
#endif
}
__device__ inline void fma_unless_minus_zero(float value, const float (&x)[2], float (&sum)[2]) {
#if defined(__CUDA_ARCH__)
  asm("{.reg .pred p; setp.ne.b32 p, %2, 0x80000000;"
      "@p fma.rn.f32 %0, %2, %3, %0; @p fma.rn.f32 %1, %2, %4, %1;}"
      : "+f"(sum[0]), "+f"(sum[1])
      : "f"(value), "f"(x[0]), "f"(x[1]));
#else
  if (value == 0 && std::signbit(value)) return;
  for (int t = 0; t < 2; ++t) sum[t] = std::fma(value, x[t], sum[t]);
#endif
}
template <int kCount>
__device__ inline void fma_unless_minus_zero(float value, const float (&x)[kCount],
                                             float (&sum)[kCount]) {
  static_assert(kCount % 4 == 0);
#if defined(__CUDA_ARCH__)
#pragma unroll
  for (int t = 0; t < kCount; t += 4) {
    asm("{.reg .pred p; setp.ne.b32 p, %4, 0x80000000;"
        "@p fma.rn.f32 %0, %4, %5, %0; @p fma.rn.f32 %1, %4, %6, %1;"
        "@p fma.rn.f32 %2, %4, %7, %2; @p fma.rn.f32 %3, %4, %8, %3;}"
        : "+f"(sum[t]), "+f"(sum[t + 1]), "+f"(sum[t + 2]), "+f"(sum[t + 3])
        : "f"(value), "f"(x[t]), "f"(x[t + 1]), "f"(x[t + 2]), "f"(x[t + 3]));
  }
#else
  if (value == 0 && std::signbit(value)) return;
  for (int t = 0; t < kCount; ++t) sum[t] = std::fma(value, x[t], sum[t]);
#endif
}

// A place in shared memory as the instructions take it, in bytes: half the arithmetic of a pointer.
// The emulator has a pointer.
#if defined(__CUDACC__)
using SharedAddress = uint32_t;
#else
using SharedAddress = const unsigned char*;
#endif

__device__ inline SharedAddress shared_address(const void* shared) {
#if defined(__CUDACC__)
  return uint32_t(__cvta_generic_to_shared(shared));
#else
  return static_cast<SharedAddress>(shared);
#endif
}

// ld.shared.u16, .u32, .v2.u32 and .v4.u32: 1, 2, 4 or 8 elements of 16 bits, in words.
__device__ inline void load_shared(SharedAddress at, uint32_t (&out)[1], uint16_t) {
#if defined(__CUDACC__)
  uint16_t half;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(half) : "r"(at));
  out[0] = half;
#else
  out[0] = *reinterpret_cast<const uint16_t*>(at);
#endif
}
__device__ inline void load_shared(SharedAddress at, uint32_t (&out)[1]) {
#if defined(__CUDACC__)
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(out[0]) : "r"(at));
#else
  out[0] = *reinterpret_cast<const uint32_t*>(at);
#endif
}
__device__ inline void load_shared(SharedAddress at, uint32_t (&out)[2]) {
#if defined(__CUDACC__)
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(out[0]), "=r"(out[1]) : "r"(at));
#else
  std::memcpy(out, at, 8);
#endif
}
__device__ inline void load_shared(SharedAddress at, uint32_t (&out)[4]) {
#if defined(__CUDACC__)
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(at));
#else
  std::memcpy(out, at, 16);
#endif
}

}  // namespace liveweight::cuda
