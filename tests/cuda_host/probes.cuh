// How probes*.cu register kernels that only the tests run: as ops of torch.ops.liveweight_probes,
// on CPU tensors where g++ compiles them over the emulator, on CUDA tensors where nvcc does.
#pragma once

#include "torch_ops.cuh"

#if defined(__CUDACC__)
#define LW_PROBES(m) STABLE_TORCH_LIBRARY_IMPL(liveweight_probes, CUDA, m)
#else
#define LW_PROBES(m) STABLE_TORCH_LIBRARY_IMPL(liveweight_probes, CPU, m)
#endif
