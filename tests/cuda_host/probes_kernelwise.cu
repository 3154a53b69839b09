// Lets the tests of kernelwise_conv2d choose the plan, in the emulator.
#include "kernelwise_conv2d_plan.cuh"
#include "probes.cuh"

#if !defined(__CUDACC__)
namespace liveweight::cuda::kernelwise {
namespace {

// Plans from now on: 0 cheapest, 1 tiled, 2 direct; patches of so many rows and blocks of so many
// warps, 0 for any.
void wish_kernelwise_conv2d(int64_t way, int64_t rows, int64_t warps) {
  wish = {int(way), int(rows), int(warps)};
}

}  // namespace
}  // namespace liveweight::cuda::kernelwise

STABLE_TORCH_LIBRARY_FRAGMENT(liveweight_probes, m) {
  m.def("wish_kernelwise_conv2d(int way, int rows, int warps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(liveweight_probes, CompositeExplicitAutograd, m) {
  m.impl("wish_kernelwise_conv2d",
         TORCH_BOX(&liveweight::cuda::kernelwise::wish_kernelwise_conv2d));
}
#endif
