// Starting a kernel: on a GPU, or on the fibres of tests/cuda_host where g++ compiles this.
//
// A kernel declares its dynamic shared memory with LW_DYNAMIC_SHARED(name): name is then an
// unsigned char*, 16-byte aligned, and Shape says how many bytes it has.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define LW_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#define LW_DYNAMIC_SHARED(name) unsigned char* const name = cuda_host::machine.shared()
#endif

namespace liveweight::cuda {

// Bytes of shared memory that a block may ask for on every GPU from compute capability 8.0 on (8.6
// and 8.9 have the least), and those it gets without asking: 48 KB, its static part included.
constexpr int kSharedLimit = 99 << 10;
constexpr int kSharedUnasked = 32 << 10;

struct Shape {
  dim3 blocks;
  int threads;
  int shared = 0;  // bytes of dynamic shared memory
};

// The grid of x * y * z blocks; raises where a GPU has no such grid, instead of wrapping around.
inline dim3 grid(int64_t x, int64_t y = 1, int64_t z = 1) {
  const auto within = [](int64_t n, int64_t most) { return n >= 1 && n <= most; };
  if (!within(x, 0x7fffffff) || !within(y, 65535) || !within(z, 65535)) {
    throw std::runtime_error("liveweight: no launch has " + std::to_string(x) + " x " +
                             std::to_string(y) + " x " + std::to_string(z) +
                             " blocks, expected 1 to 2147483647 x 65535 x 65535");
  }
  return dim3(unsigned(x), unsigned(y), unsigned(z));
}

struct Launch {
  cudaStream_t stream;

  // Starts kernel(arguments...) on the stream; raises what the driver says against it.
  template <typename Kernel, typename... Arguments>
  void operator()(Kernel kernel, Shape shape, Arguments... arguments) const {
#if defined(__CUDACC__)
    if (shape.shared > kSharedUnasked) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 shape.shared));
    }
    kernel<<<shape.blocks, unsigned(shape.threads), size_t(shape.shared), stream>>>(arguments...);
    check(cudaGetLastError());
#else
    cuda_host::machine.launch(shape.blocks, unsigned(shape.threads), shape.shared,
                              [=] { kernel(arguments...); });
#endif
  }

#if defined(__CUDACC__)
  static void check(cudaError_t status) {
    if (status == cudaSuccess) return;
    throw std::runtime_error(std::string("liveweight: CUDA kernel not launched: ") +
                             cudaGetErrorString(status));
  }
#endif
};

}  // namespace liveweight::cuda
