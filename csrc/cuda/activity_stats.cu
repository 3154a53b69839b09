// Launcher and registration of activity_stats_ for CUDA; the kernels are in activity_stats.cuh.
#include "activity_stats.cuh"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 has only the other spelling
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace liveweight::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

struct Launch {
  cudaStream_t stream;

  template <typename Kernel, typename... Arguments>
  void operator()(Kernel kernel, int64_t x, int64_t y, int threads, Arguments... arguments) const {
    kernel<<<dim3(unsigned(x), unsigned(y)), threads, 0, stream>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

template <typename T>
void run(const Tensor& stats, const Tensor& x, double eps) {
  const Extent extent{x.size(0), x.size(1), x.size(2)};
  const T* data = static_cast<const T*>(x.const_data_ptr());
  const Plan plan = make_plan(extent, sizeof(T), int(reinterpret_cast<uintptr_t>(data) % 16));
  STD_TORCH_CHECK(plan.tiles < int64_t(1) << 31,
                  "activity_stats_: x has too many features for one launch, got ", plan.width);
  // From torch's allocator, so that the call can be captured in a CUDA graph.
  const Tensor partials = torch::stable::new_empty(stats, {plan.splits, kStats, plan.width});
  activity_stats(data, extent, plan, eps, static_cast<double*>(partials.mutable_data_ptr()),
                 static_cast<double*>(stats.mutable_data_ptr()), Launch{current_stream(x)});
}

void activity_stats_cuda(Tensor stats, const Tensor& x, double eps) {
  STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous(),
                  "activity_stats_: x must be contiguous [N, F, P], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(stats.dim() == 2 && stats.size(0) == kStats && stats.size(1) == x.size(1),
                  "activity_stats_: stats must be [4, ", x.size(1), "]");
  STD_TORCH_CHECK(stats.scalar_type() == ScalarType::Double && stats.is_contiguous(),
                  "activity_stats_: stats must be contiguous float64");
  STD_TORCH_CHECK(stats.is_cuda() && stats.get_device_index() == x.get_device_index(),
                  "activity_stats_: stats and x must be on the same GPU");
  STD_TORCH_CHECK(eps >= 0, "activity_stats_: eps must be >= 0, got ", eps);
  STD_TORCH_CHECK(x.size(2) < int64_t(1) << 31, "activity_stats_: a run of ", x.size(2),
                  " elements is too long, expected fewer than 2**31");
  if (x.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run<float>(stats, x, eps);
    case ScalarType::BFloat16:
      return run<Bf16>(stats, x, eps);
    case ScalarType::Half:
      return run<Half>(stats, x, eps);
    default:
      STD_TORCH_CHECK(false, "activity_stats_: x must be float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

}  // namespace
}  // namespace liveweight::cuda

STABLE_TORCH_LIBRARY_IMPL(liveweight, CUDA, m) {
  m.impl("activity_stats_", TORCH_BOX(&liveweight::cuda::activity_stats_cuda));
}
