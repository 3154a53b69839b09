// Asynchronous copies from global to shared memory (cp.async), 16 or 4 bytes each.
//
// A thread issues copies, closes them into a group, and later waits until at most N groups are
// unfinished; a barrier then shows the data to the other threads. The emulator copies no earlier
// than the wait, and leaves garbage at the destination until then.
#pragma once

#include "ptx.cuh"
#include "ptx_shared.cuh"

namespace liveweight::cuda {

// cp.async.cg.shared.global: both addresses on 16-byte boundaries; zeros where !valid, and then
// nothing is read.
__device__ inline void cp_async16(void* shared, const void* global, bool valid = true) {
#if defined(__CUDACC__)
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(to), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#else
  auto& machine = cuda_host::machine;
  if (reinterpret_cast<uintptr_t>(shared) % 16) machine.fail("cp_async16: misaligned destination");
  if (valid && reinterpret_cast<uintptr_t>(global) % 16) {
    machine.fail("cp_async16: misaligned source");
  }
  machine.self().copies.issue(shared, valid ? global : nullptr);
#endif
}

// cp.async.ca.shared.global of 4 bytes: both addresses on 4-byte boundaries.
__device__ inline void cp_async4(SharedAddress shared, const void* global) {
#if defined(__CUDACC__)
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" : : "r"(shared), "l"(global) : "memory");
#else
  auto& machine = cuda_host::machine;
  if (reinterpret_cast<uintptr_t>(shared) % 4) machine.fail("cp_async4: misaligned destination");
  if (reinterpret_cast<uintptr_t>(global) % 4) machine.fail("cp_async4: misaligned source");
  machine.self().copies.issue(const_cast<unsigned char*>(shared), global, 4);
#endif
}

// cp.async.commit_group: closes the copies issued since the last one into a group, even if none.
__device__ inline void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" : : : "memory");
#else
  cuda_host::machine.self().copies.commit();
#endif
}

// cp.async.wait_group: waits until at most the N latest groups of this thread are unfinished.
#if defined(__CUDACC__)
template <int N>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}
#else
template <int N>
inline void cp_async_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  auto& machine = cuda_host::machine;
  if (!machine.dropped(file, line)) machine.self().copies.wait(N);
}
#endif

}  // namespace liveweight::cuda
