// Shared memory by 32-bit addresses in its own window.
//
// An address kept in a register or in a table is then ready for the load: no base is added, and an
// offset known at compile time is part of the instruction. In the emulator addresses count from the
// beginning of dynamic shared memory.
#pragma once

#include "ptx_copy.cuh"

namespace liveweight::cuda {

__device__ inline uint32_t window_address(const void* shared) {
#if defined(__CUDACC__)
  return uint32_t(__cvta_generic_to_shared(shared));
#else
  return uint32_t(static_cast<const unsigned char*>(shared) - cuda_host::machine.shared());
#endif
}

// ld.shared.u16, widened with zeros.
__device__ inline uint32_t load_window_half(uint32_t at) {
#if defined(__CUDACC__)
  uint16_t out;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(out) : "r"(at) : "memory");
  return out;
#else
  return *reinterpret_cast<const uint16_t*>(cuda_host::machine.shared_at(at, 2));
#endif
}

// ld.shared.v4.u32
__device__ inline Vector16 load_window(uint32_t at) {
#if defined(__CUDACC__)
  Vector16 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(at)
               : "memory");
  return v;
#else
  return *reinterpret_cast<const Vector16*>(cuda_host::machine.shared_at(at, 16));
#endif
}

// ld.shared.v2.u32
__device__ inline void load_window(uint32_t at, uint32_t& first, uint32_t& second) {
#if defined(__CUDACC__)
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(first), "=r"(second)
               : "r"(at)
               : "memory");
#else
  const uint2 v = *reinterpret_cast<const uint2*>(cuda_host::machine.shared_at(at, 8));
  first = v.x;
  second = v.y;
#endif
}

// st.shared.u16
__device__ inline void store_window_half(uint32_t at, uint32_t half) {
#if defined(__CUDACC__)
  asm volatile("st.shared.u16 [%0], %1;" : : "r"(at), "h"(uint16_t(half)) : "memory");
#else
  *reinterpret_cast<uint16_t*>(cuda_host::machine.shared_at(at, 2)) = uint16_t(half);
#endif
}

// st.shared.v2.u32
__device__ inline void store_window(uint32_t at, uint32_t first, uint32_t second) {
#if defined(__CUDACC__)
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" : : "r"(at), "r"(first), "r"(second) : "memory");
#else
  *reinterpret_cast<uint2*>(cuda_host::machine.shared_at(at, 8)) = make_uint2(first, second);
#endif
}

// cp.async.cg.shared.global of 16 bytes (see ptx_copy.cuh).
__device__ inline void cp_async_window(uint32_t at, const void* global) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(at), "l"(global) : "memory");
#else
  cp_async16(cuda_host::machine.shared_at(at, 16), global);
#endif
}

}  // namespace liveweight::cuda
