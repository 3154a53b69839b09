// Launcher and registration of activity_stats_ for CUDA; the kernels are in activity_stats.cuh.
#include "activity_stats.cuh"

#include "torch_ops.cuh"

namespace liveweight::cuda {
namespace {

constexpr const char* kOp = "activity_stats_";

void activity_stats_cuda(Tensor stats, const Tensor& x, double eps, int64_t channels) {
  require(x.dim() == 3 && x.is_contiguous(), kOp, "x must be contiguous [N, F, P], got ",
          shape_text(x));
  check_tensor(kOp, "stats", stats, ScalarType::Double, {kStats, x.size(1)}, x);
  require(eps >= 0, kOp, "eps must be >= 0, got ", eps);
  require(channels >= 0 && (channels == 0 || x.size(1) % channels == 0), kOp,
          "channels must be 0 or divide the features, got ", channels, " of ", x.size(1));
  require(x.size(2) < int64_t(1) << 31, kOp, "a run of ", x.size(2),
          " elements is too long, expected fewer than 2**31");
  if (x.numel() == 0) return;
  const OnDevice guard(x);
  const Launch launch = launcher(x);
  with_type<float, Bf16, Half>(kOp, "x", x, [&](auto zero) {
    using T = decltype(zero);
    const Extent extent{x.size(0), x.size(1), x.size(2)};
    const Plan plan = make_plan(extent, sizeof(T), misalignment(x));
    const Tensor partials = empty(stats, {plan.one_launch ? 0 : plan.splits, kStats, plan.width},
                                  ScalarType::Double);
    activity_stats(typed<const T>(x), extent, plan, eps, channels, typed<double>(partials),
                   typed<double>(stats), launch);
  });
}

}  // namespace
}  // namespace liveweight::cuda

LW_CUDA_LIBRARY(m) {
  m.impl("activity_stats_", TORCH_BOX(&liveweight::cuda::activity_stats_cuda));
}
