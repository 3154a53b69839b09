// Launcher and registration of gram_norms_ for CUDA; the kernels are in gram_norms.cuh.
#include "gram_norms.cuh"
#include "torch_ops.cuh"

namespace liveweight::cuda::gram {
namespace {

constexpr const char* kOp = "gram_norms_";

void gram_norms_cuda(Tensor sums, const Tensor& gram, const Tensor& weight) {
  check_tensor(kOp, "gram", gram, ScalarType::Float, {-1, -1, -1}, gram);
  check_tensor(kOp, "weight", weight, ScalarType::Float, {-1, -1, -1}, gram);
  check_tensor(kOp, "sums", sums, ScalarType::Double, {weight.size(0), weight.size(1)}, gram);
  const int64_t taps = weight.size(2), channels = gram.size(1), per_group = weight.size(1);
  require(taps >= 1 && taps <= 128, kOp, "weight must have 1 to 128 taps, got ", taps);
  require(gram.size(2) == taps * (taps + 1) / 2, kOp, "gram of ", taps,
          " taps must have ", taps * (taps + 1) / 2, " entries, got ", gram.size(2));
  if (gram.numel() == 0 || weight.numel() == 0) return;
  require(channels % per_group == 0, kOp, "gram has ", channels,
          " channels, which weight's ", per_group, " per group do not divide");
  const int64_t groups = channels / per_group;
  require(weight.size(0) % groups == 0, kOp, "weight's ", weight.size(0),
          " filters are no multiple of ", groups, " groups");
  const NormShape shape{gram.size(0),  channels,  weight.size(0) / groups,
                        per_group,     int(taps), gram.size(2)};
  const NormPlan plan = make_norm_plan(shape);
  const OnDevice guard(gram);
  const Tensor partials = empty(gram, {plan.parts > 1 ? plan.parts : 0, weight.size(0), per_group},
                                ScalarType::Double);
  gram_norms(typed<const float>(gram), typed<const float>(weight), shape, plan,
             typed<double>(partials), typed<double>(sums), launcher(gram));
}

}  // namespace
}  // namespace liveweight::cuda::gram

LW_CUDA_LIBRARY(m) {
  m.impl("gram_norms_", TORCH_BOX(&liveweight::cuda::gram::gram_norms_cuda));
}
