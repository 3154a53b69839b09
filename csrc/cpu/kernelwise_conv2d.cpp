// y = pool(act(conv2d(x, W) + b)) where whole 2-D kernels of W are missing: checks, and the choice of a
// path by shape.
#include "kernelwise_conv2d.h"

#ifdef LW_BASE
namespace liveweight {

void run_contiguous(const KernelwiseConv& conv, int64_t begin, int64_t end) {
  const int64_t lanes = cpu_lanes();
  if (prefer_wide(conv.sizes, lanes)) return run_wide(conv, begin, end);
  if (prefer_folded(conv.sizes, lanes)) return run_folded(conv, begin, end);
  if (prefer_strided(conv, lanes)) return run_strided(conv, begin, end);
  run_planes(conv, begin, end);
}

void run_fp32(const KernelwiseConv& conv) {
  if (prefer_pointwise(conv)) return run_pointwise(conv);
  const int64_t samples = conv.sizes.B, side_by_side = lanes_samples(conv, cpu_lanes());
  if (side_by_side > 0) run_lanes(conv, 0, side_by_side);
  if (side_by_side == samples) return;
  if (conv.contiguous()) run_contiguous(conv, side_by_side, samples);
  else run_turned(conv, side_by_side, samples);
}

namespace {

Tensor kernelwise_conv2d(const Tensor& x, const Tensor& values, const Tensor& filter_offsets,
                         const Tensor& channels, const std::optional<Tensor>& bias,
                         std::vector<int64_t> stride, std::vector<int64_t> padding,
                         std::vector<int64_t> dilation, int64_t groups, bool relu, int64_t pool, int64_t layout) {
  const char* op = "kernelwise_conv2d";
  const bool bf16 = x.scalar_type() == ScalarType::BFloat16;
  const ScalarType dtype = bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  KernelwiseConv conv{};
  KeptFilters& filters = conv.filters;
  const void* from = checked_picture<void>(op, "x", x, conv.x_layout, dtype);
  LW_CHECK(layout >= 0 && layout <= 2, op, ": layout must be 0, 1 or 2, got ", layout);
  conv.y_layout = x.size(0) == 1 && layout == 2 ? Layout::contiguous : Layout(layout);  // the same for one sample
  const void* weights = checked_data<void>(op, "values", values, 3, dtype);
  const ConvSizes s = conv.sizes =
      conv_sizes(op, {x.size(0), x.size(1), x.size(2), x.size(3)}, filter_offsets.numel() - 1,
                 {values.size(1), values.size(2)}, stride, padding, dilation, groups);
  const KeptKernels kept = check_kept(op, filter_offsets, channels, s.C / groups);
  LW_CHECK(values.size(0) == kept.count, op, ": expected ", kept.count, " kernels, got ", values.size(0));
  LW_CHECK(pool >= 1 && pool <= std::min(s.height, s.width), op, ": cannot pool ", s.height, " x ",
           s.width, " by ", pool);
  const void* shift = bias ? checked_data<void>(op, "bias", *bias, 1, dtype) : nullptr;
  LW_CHECK(!bias || bias->numel() == s.filters, op, ": expected bias [", s.filters, "], got ", shape_of(*bias));
  filters = {nullptr, kept.offsets, kept.channels, nullptr, s.C / groups, std::max<int64_t>(s.filters / groups, 1),
             relu, pool};
  conv.kept = kept.count;
  Tensor y = new_picture(x, {s.B, s.filters, s.height / pool, s.width / pool}, Layout(layout));
  if (y.numel() == 0) return y;
  if (bf16) {
    run_bf16(conv, static_cast<const Bf16*>(from), static_cast<const Bf16*>(weights),
             static_cast<const Bf16*>(shift), static_cast<Bf16*>(y.mutable_data_ptr()));
    return y;
  }
  conv.x = static_cast<const float*>(from);
  filters.values = static_cast<const float*>(weights);
  filters.bias = static_cast<const float*>(shift);
  conv.y = static_cast<float*>(y.mutable_data_ptr());
  run_fp32(conv);
  return y;
}

}  // namespace
}  // namespace liveweight

STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) {
  m.impl("kernelwise_conv2d", TORCH_BOX(&liveweight::kernelwise_conv2d));
}
#endif  // LW_BASE
