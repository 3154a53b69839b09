// Dot products of short integers, running sums of a warp, and a cached load of 16 bytes.
#pragma once

#include "ptx.cuh"

namespace liveweight::cuda {

// dp4a.u32.u32: sum + a[0] b[0] + ... + a[3] b[3] over the bytes of a and b, modulo 2^32.
__device__ inline uint32_t dot4(uint32_t a, uint32_t b, uint32_t sum) {
#if defined(__CUDACC__)
  uint32_t out;
  asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(sum));
  return out;
#else
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 255u) * (b >> i & 255u);
  return sum;
#endif
}

// dp2a.lo.s32.u32: sum + a[0] b[0] + a[1] b[1] with the signed halves of a and bytes 0 and 1 of b.
__device__ inline uint32_t dot2_low(uint32_t a, uint32_t b, uint32_t sum) {
#if defined(__CUDACC__)
  uint32_t out;
  asm("dp2a.lo.s32.u32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(sum));
  return out;
#else
  const auto half = [a](int i) { return uint32_t(int32_t(int16_t(a >> i))); };
  return sum + half(0) * (b & 255u) + half(16) * (b >> 8 & 255u);
#endif
}

// dp2a.hi.s32.u32: the same with bytes 2 and 3 of b.
__device__ inline uint32_t dot2_high(uint32_t a, uint32_t b, uint32_t sum) {
#if defined(__CUDACC__)
  uint32_t out;
  asm("dp2a.hi.s32.u32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(sum));
  return out;
#else
  return dot2_low(a, b >> 16, sum);
#endif
}

// The sum over this lane and those below it, modulo 2^32: five shfl.sync.up, each with the predicate
// that tells whether there was such a lane.
__device__ inline uint32_t running_sum(uint32_t value) {
#if defined(__CUDACC__)
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    asm volatile(
        "{.reg .u32 below; .reg .pred has;\n"
        "shfl.sync.up.b32 below|has, %0, %1, 0, 0xffffffff;\n"
        "@has add.u32 %0, %0, below;}"
        : "+r"(value)
        : "r"(by));
  }
#else
  for (int by = 1; by < 32; by *= 2) {
    const uint32_t below = shfl_up(value, by);
    if (lane_id() >= by) value += below;
  }
#endif
  return value;
}

// ld.global.nc.v4.u32: read-only data that other warps of the multiprocessor read too.
__device__ inline Vector16 load_cached(const void* address) {
#if defined(__CUDACC__)
  Vector16 v;
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
      : "l"(address));
  return v;
#else
  return *static_cast<const Vector16*>(address);
#endif
}

}  // namespace liveweight::cuda
