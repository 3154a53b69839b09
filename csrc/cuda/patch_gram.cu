// Launcher and registration of patch_gram for CUDA; the kernels are in patch_gram*.cuh.
#include "patch_gram.cuh"
#include "torch_ops.cuh"

#include <vector>

namespace liveweight::cuda::gram {
namespace {

constexpr const char* kOp = "patch_gram";
using Ints = std::vector<int64_t>;

// Positions of a window along one side of a map.
int positions(const char* side, int64_t size, int64_t kernel, int64_t stride, int64_t before,
              int64_t after, int64_t dilation) {
  require(size < int64_t(1) << 30, kOp, "x has ", size, " ", side, ", expected fewer than 2**30");
  require(kernel >= 1 && stride >= 1 && dilation >= 1, kOp,
          "kernel_size, stride and dilation must be >= 1, got ", kernel, ", ", stride, " and ",
          dilation);
  require(before >= 0 && after >= 0, kOp, "padding must be >= 0, got ", before, " and ", after);
  const int64_t room = size + before + after - dilation * (kernel - 1) - 1;
  require(room >= 0 && room < int64_t(1) << 30, kOp, "a window of ", kernel, " with dilation ",
          dilation, " does not fit into ", size + before + after, " padded ", side);
  return int(room / stride + 1);
}

Patches make_patches(const Tensor& x, const Ints& kernel, const Ints& stride, const Ints& padding,
                     const Ints& dilation) {
  require(kernel.size() == 2 && stride.size() == 2 && dilation.size() == 2 && padding.size() == 4,
          kOp, "expected kernel_size [2], stride [2], padding [4] and dilation [2]");
  require(kernel[0] * kernel[1] <= kMostTaps, kOp, "kernel_size must have at most ", kMostTaps,
          " taps, got ", kernel[0], " x ", kernel[1]);
  Patches p{};
  p.out_rows = positions("rows", x.size(2), kernel[0], stride[0], padding[0], padding[1],
                         dilation[0]);
  p.out_columns = positions("columns", x.size(3), kernel[1], stride[1], padding[2], padding[3],
                            dilation[1]);
  p.kernel_rows = int(kernel[0]);
  p.kernel_columns = int(kernel[1]);
  // A stride past the map reads one position, whatever it is.
  p.stride_rows = p.out_rows == 1 ? 1 : int(stride[0]);
  p.stride_columns = p.out_columns == 1 ? 1 : int(stride[1]);
  p.dilation_rows = p.kernel_rows == 1 ? 1 : int(dilation[0]);
  p.dilation_columns = p.kernel_columns == 1 ? 1 : int(dilation[1]);
  p.top = int(padding[0]);
  p.left = int(padding[2]);
  return p;
}

Tensor patch_gram_cuda(const Tensor& x, Ints kernel, Ints stride, Ints padding,
                       Ints dilation) {
  require(x.dim() == 4, kOp, "x must be [N, C, H, W], got ", shape_text(x));
  const Patches patches = make_patches(x, kernel, stride, padding, dilation);
  const Maps maps{x.size(0) * x.size(1), x.size(1),      x.stride(0),     x.stride(1),
                  x.stride(2),           x.stride(3),    int(x.size(2)),  int(x.size(3))};
  const int64_t size = packed_size(patches.taps());
  const int64_t span = (x.size(2) - 1) * x.stride(2) + (x.size(3) - 1) * x.stride(3);
  require(span < int64_t(1) << 31, kOp, "a map of x spans ", span + 1,
          " elements of memory, expected at most 2**31");
  const OnDevice guard(x);
  const Tensor out = empty(x, {x.size(0), x.size(1), size}, ScalarType::Float);
  if (maps.count == 0) return out;
  const GramPlan plan = make_gram_plan(maps, patches);
  const Tensor partials =
      empty(x, {plan.parts > 1 ? plan.parts : 0, maps.count, size}, ScalarType::Float);
  with_type<float, Bf16, Half>(kOp, "x", x, [&](auto zero) {
    using T = decltype(zero);
    patch_gram(typed<const T>(x), maps, patches, plan, typed<float>(partials), typed<float>(out),
               launcher(x));
  });
  return out;
}

}  // namespace
}  // namespace liveweight::cuda::gram

LW_CUDA_LIBRARY(m) {
  m.impl("patch_gram", TORCH_BOX(&liveweight::cuda::gram::patch_gram_cuda));
}
