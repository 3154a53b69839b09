// activity_stats_ with a plan that its launcher would not choose.
#include "activity_stats.cuh"
#include "probes.cuh"

namespace liveweight::cuda {
namespace {

// activity_stats_ with one split: long sums per thread, as only large inputs have them otherwise.
void activity_stats_one_split(Tensor stats, const Tensor& x, double eps) {
  const OnDevice guard(x);
  const Launch launch = launcher(x);
  with_type<float, Bf16, Half>("activity_stats_one_split", "x", x, [&](auto zero) {
    using T = decltype(zero);
    const Extent extent{x.size(0), x.size(1), x.size(2)};
    Plan plan = make_plan(extent, sizeof(T), misalignment(x));
    plan.splits = 1;
    plan.per_split = plan.columns ? extent.rows : extent.rows * plan.slots;
    const Tensor partials = empty(stats, {plan.splits, kStats, plan.width}, ScalarType::Double);
    plan.one_launch = false;
    activity_stats(typed<const T>(x), extent, plan, eps, 0, typed<double>(partials),
                   typed<double>(stats), launch);
  });
}

}  // namespace
}  // namespace liveweight::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(liveweight_probes, m) {
  m.def("activity_stats_one_split(Tensor(a!) stats, Tensor x, float eps) -> ()");
}

LW_PROBES(m) {
  m.impl("activity_stats_one_split", TORCH_BOX(&liveweight::cuda::activity_stats_one_split));
}
