// One wrapper per PTX instruction: the instruction on the device, its meaning in C++ elsewhere.
//
// The second half is what the host emulator of tests/cuda_host executes. It is our reading of the
// PTX manual, so each wrapper is also compared with the real instruction by a GPU test. Copies to
// shared memory and the tensor cores are in ptx_copy.cuh and ptx_matrix.cuh.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace liveweight::cuda {

// 16 bytes, the widest single load.
struct alignas(16) Vector16 {
  uint32_t word[4];
};

struct alignas(8) Vector8 {
  uint32_t word[2];
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

// ld.global.nc.b32 and .b16: read-only data behind a pointer that came from shared memory, of which
// the compiler cannot tell that it is a global one.
__host__ __device__ inline float load_global(const float* address) {
#if defined(__CUDA_ARCH__)
  float value;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(address));
  return value;
#else
  return *address;
#endif
}

template <typename T>
__host__ __device__ inline T load_global(const T* address) {
  static_assert(sizeof(T) == 2);
#if defined(__CUDA_ARCH__)
  T value;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(value.bits) : "l"(address));
  return value;
#else
  return *address;
#endif
}

// ld.global.nc.L1::no_allocate.v2.u32: the same of 8 bytes.
__host__ __device__ inline Vector8 load_streaming8(const void* address) {
#if defined(__CUDA_ARCH__)
  Vector8 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.word[0]), "=r"(v.word[1])
               : "l"(address));
  return v;
#else
  return *static_cast<const Vector8*>(address);
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

// sqrt.approx.f32: off by at most one unit in the last place or so, 0 of 0, NaN of NaN.
__host__ __device__ inline float square_root(float value) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(out) : "f"(value));
  return out;
#else
  return sqrtf(value);
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

// cvt.rn.bf16.f32 and cvt.rn.f16.f32: to the nearest, ties to even; every NaN becomes 0x7fff.
template <typename T>
__device__ inline T from_float(float value);

template <>
__device__ inline float from_float<float>(float value) {
  return value;
}

template <>
__device__ inline Bf16 from_float<Bf16>(float value) {
#if defined(__CUDACC__)
  Bf16 out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
  return out;
#else
  if (value != value) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}

template <>
__device__ inline Half from_float<Half>(float value) {
#if defined(__CUDACC__)
  Half out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
  return out;
#else
  if (value != value) return {0x7fff};
  const _Float16 half = static_cast<_Float16>(value);
  Half out;
  std::memcpy(&out, &half, sizeof out);
  return out;
#endif
}

// cvt.rn.bf16x2.f32, cvt.rn.f16x2.f32: both rounded, `low` in the lower half of the word.
__device__ inline uint32_t pack2(float low, float high, Bf16) {
#if defined(__CUDACC__)
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#else
  return uint32_t(from_float<Bf16>(high).bits) << 16 | from_float<Bf16>(low).bits;
#endif
}

__device__ inline uint32_t pack2(float low, float high, Half) {
#if defined(__CUDACC__)
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#else
  return uint32_t(from_float<Half>(high).bits) << 16 | from_float<Half>(low).bits;
#endif
}

// The halves of a word of two elements, widened.
template <typename T>
__device__ inline float low_half(uint32_t word, T) {
  return to_float(T{uint16_t(word)});
}
template <typename T>
__device__ inline float high_half(uint32_t word, T) {
  return to_float(T{uint16_t(word >> 16)});
}
__device__ inline float high_half(uint32_t word, Bf16) {
  return bits_to_float(word & 0xffff0000u);
}

// popc.b32
__device__ inline int popc(uint32_t x) { return __popc(x); }

// prmt.b32: four bytes of {b, a}, byte i by nibble i of the selector (0 to 3 of a, 4 to 7 of b; its
// highest bit asks for eight copies of the byte's sign instead).
__device__ inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDACC__)
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
  return out;
#else
  return __byte_perm(a, b, selector);
#endif
}

// shf.r.wrap.b32: the lower word of {high, low} >> (by % 32).
__device__ inline uint32_t funnel_shift(uint32_t low, uint32_t high, uint32_t by) {
  return __funnelshift_r(low, high, by);
}

// %laneid; blocks are one-dimensional.
__device__ inline int lane_id() { return int(threadIdx.x) % 32; }

// %lanemask_lt: ones for the lanes below this one.
__device__ inline uint32_t lane_mask_lt() {
#if defined(__CUDACC__)
  uint32_t out;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(out));
  return out;
#else
  return (1u << lane_id()) - 1u;
#endif
}

// Collectives of a whole warp: all 32 lanes must come.
constexpr uint32_t kAllLanes = 0xffffffffu;

// vote.sync.ballot: bit i is lane i's predicate.
__device__ inline uint32_t ballot(bool predicate) { return __ballot_sync(kAllLanes, predicate); }

// shfl.sync.idx, .bfly, .up, .down; .up and .down give a lane its own value past the warp's end.
template <typename T>
__device__ inline T shfl(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
template <typename T>
__device__ inline T shfl_xor(T value, int bits) {
  return __shfl_xor_sync(kAllLanes, value, bits);
}
template <typename T>
__device__ inline T shfl_up(T value, int by) {
  return __shfl_up_sync(kAllLanes, value, by);
}
template <typename T>
__device__ inline T shfl_down(T value, int by) {
  return __shfl_down_sync(kAllLanes, value, by);
}

// redux.sync.add.u32 and .s32: every lane gets the sum, modulo 2^32.
__device__ inline uint32_t reduce_add(uint32_t value) {
  return __reduce_add_sync(kAllLanes, value);
}
__device__ inline int reduce_add(int value) { return __reduce_add_sync(kAllLanes, value); }

}  // namespace liveweight::cuda
