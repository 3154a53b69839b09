// Single words from global memory, and gathers from shared memory by 32-bit addresses.
#pragma once

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

// Where a lane stands in shared memory: an address of 32 bits on the device, a pointer elsewhere.
#if defined(__CUDA_ARCH__)
using SharedAddress = uint32_t;
#else
using SharedAddress = const unsigned char*;
#endif

__device__ inline SharedAddress shared_address(const unsigned char* shared) {
#if defined(__CUDA_ARCH__)
  return uint32_t(__cvta_generic_to_shared(shared));
#else
  return shared;
#endif
}

// ld.shared.u16, .u32, .v2.u32 and .v4.u32: 1, 2, 4 or 8 elements of 16 bits, in words.
__device__ inline void load_shared(SharedAddress at, uint32_t (&out)[1], uint16_t) {
#if defined(__CUDA_ARCH__)
  uint16_t half;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(half) : "r"(at));
  out[0] = half;
#else
  out[0] = *reinterpret_cast<const uint16_t*>(at);
#endif
}
__device__ inline void load_shared(SharedAddress at, uint32_t (&out)[1]) {
#if defined(__CUDA_ARCH__)
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(out[0]) : "r"(at));
#else
  out[0] = *reinterpret_cast<const uint32_t*>(at);
#endif
}
__device__ inline void load_shared(SharedAddress at, uint32_t (&out)[2]) {
#if defined(__CUDA_ARCH__)
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(out[0]), "=r"(out[1]) : "r"(at));
#else
  std::memcpy(out, at, 8);
#endif
}
__device__ inline void load_shared(SharedAddress at, uint32_t (&out)[4]) {
#if defined(__CUDA_ARCH__)
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(at));
#else
  std::memcpy(out, at, 16);
#endif
}

}  // namespace liveweight::cuda
