// Launcher and registration of kernelwise_conv2d for CUDA: checks and allocation.
#include "kernelwise_conv2d.cuh"

#include <algorithm>
#include <vector>

#include "torch_ops.cuh"

namespace liveweight::cuda::kernelwise {
namespace {

constexpr const char* kOp = "kernelwise_conv2d";
constexpr int64_t kMostSize = int64_t(1) << 30;  // of a picture and of all pairs

// Places of a picture's sizes in memory, outermost first: contiguous, channels last, batch last
// (src/liveweight/reference/layouts.py).
constexpr int kOrder[3][4] = {{0, 1, 2, 3}, {0, 2, 3, 1}, {1, 2, 3, 0}};

void layout_strides(const int64_t (&sizes)[4], int64_t layout, int64_t (&strides)[4]) {
  int64_t step = 1;
  for (int i = 3; i >= 0; --i) {
    const int d = kOrder[layout][i];
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
}

// The strides of x in the first layout that fits it; sizes of one may have any stride.
void picture_strides(const Tensor& x, const int64_t (&sizes)[4], int64_t (&strides)[4]) {
  for (int layout = 0; layout < 3; ++layout) {
    layout_strides(sizes, layout, strides);
    bool fits = true;
    for (int d = 0; d < 4; ++d) fits &= sizes[d] == 1 || x.stride(d) == strides[d];
    if (fits || x.numel() == 0) return;
  }
  require(false, kOp, "expected x contiguous, channels last or batch last");
}

// A new picture on the device of `like` and of its dtype; in the emulator filled with NaN.
Tensor new_picture(const Tensor& like, const int64_t (&sizes)[4], const int64_t (&strides)[4]) {
  int32_t dtype, device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      4, sizes, strides, dtype, device, like.get_device_index(), &handle));
  Tensor out(handle);
#if !defined(__CUDACC__)
  if (out.numel()) std::memset(out.mutable_data_ptr(), 0xff, out.numel() * out.element_size());
#endif
  return out;
}

void read_pair(const char* name, const std::vector<int64_t>& pair, int64_t least, int (&out)[2]) {
  require(pair.size() == 2 && std::min(pair[0], pair[1]) >= least &&
              std::max(pair[0], pair[1]) < kMostSize,
          kOp, name, " must be two numbers >= ", least, " and below 2**30");
  out[0] = int(pair[0]), out[1] = int(pair[1]);
}

// Sizes of the convolution; raises where they do not fit together.
Conv read_sizes(const Tensor& x, const Tensor& values, int64_t filters,
                const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                const std::vector<int64_t>& dilation, int64_t groups, int64_t pool) {
  Conv c{};
  read_pair("kernel size", {values.size(1), values.size(2)}, 1, c.kernel);
  read_pair("stride", stride, 1, c.stride);
  read_pair("padding", padding, 0, c.padding);
  read_pair("dilation", dilation, 1, c.dilation);
  require(groups >= 1 && x.size(1) % groups == 0 && filters % groups == 0, kOp, x.size(1),
          " channels and ", filters, " filters do not form ", groups, " groups");
  require(std::max({x.size(1), x.size(2), x.size(3), filters}) < kMostSize, kOp,
          "expected channels, filters and sides of x below 2**30, got x ", shape_text(x), " and ",
          filters, " filters");
  c.batch = x.size(0), c.height = int(x.size(2)), c.width = int(x.size(3));
  c.groups = int(groups);
  c.group_channels = int(x.size(1) / groups), c.group_filters = int(filters / groups);
  int64_t room[2];
  for (int d = 0; d < 2; ++d) {
    room[d] = x.size(2 + d) + 2 * int64_t(c.padding[d]) -
              int64_t(c.dilation[d]) * (c.kernel[d] - 1) - 1;
    require(room[d] >= 0, kOp, "x of ", c.height, " x ", c.width, " is smaller than the kernel");
    require(room[d] < kMostSize, kOp, "a padding of ", c.padding[d], " is too large");
  }
  c.out_height = int(room[0] / c.stride[0] + 1), c.out_width = int(room[1] / c.stride[1] + 1);
  require(pool >= 1 && pool <= std::min(c.out_height, c.out_width), kOp, "cannot pool ",
          c.out_height, " x ", c.out_width, " by ", pool);
  c.pool = int(pool);
  return c;
}

// x or values as floats: themselves, or a copy that lies in memory in the same order. `keeper`
// holds the copy.
template <typename T>
const float* widened(const Tensor& given, Tensor& keeper, Launch launch) {
  if constexpr (std::is_same_v<T, float>) {
    return static_cast<const float*>(address(given));
  } else {
    const T* from = static_cast<const T*>(address(given));
    const int64_t count = given.numel();
    const int skipped = (4 - widen_head(from, count) % 4) % 4;
    keeper = empty(given, {count + skipped}, ScalarType::Float);
    float* to = typed<float>(keeper) + skipped;
    widen_all(from, count, to, launch);
    return to;
  }
}

template <typename T>
void run(Conv c, const Tensor& x, const Tensor& values, Launch launch) {
  c.element = std::is_same_v<T, float>  ? Element::kFloat
              : std::is_same_v<T, Bf16> ? Element::kBf16
                                        : Element::kHalf;
  Tensor wide_x = x, wide_values = values;
  c.x = widened<T>(x, wide_x, launch);
  c.values = widened<T>(values, wide_values, launch);
  kernelwise_conv2d(c, launch);
}

Tensor kernelwise_conv2d_cuda(const Tensor& x, const Tensor& values, const Tensor& filter_offsets,
                              const Tensor& channels, const std::optional<Tensor>& bias,
                              std::vector<int64_t> stride, std::vector<int64_t> padding,
                              std::vector<int64_t> dilation, int64_t groups, bool relu,
                              int64_t pool, int64_t layout) {
  check_shape(kOp, "x", x, {-1, -1, -1, -1});
  const ScalarType dtype = x.scalar_type();
  const int64_t kept = channels.numel();
  check_tensor(kOp, "channels", channels, ScalarType::Int, {-1}, x);
  check_tensor(kOp, "values", values, dtype, {kept, -1, -1}, x);
  check_tensor(kOp, "filter_offsets", filter_offsets, ScalarType::Int, {-1}, x);
  require(filter_offsets.numel() > 0, kOp, "filter_offsets is empty");
  require(kept <= 0x7fffffff, kOp, "expected fewer than 2**31 kernels, got ", kept);
  const int64_t filters = filter_offsets.numel() - 1;
  check_tensor(kOp, "bias", bias, dtype, {filters}, x);
  require(layout >= 0 && layout <= 2, kOp, "layout must be 0, 1 or 2, got ", layout);
  Conv c = read_sizes(x, values, filters, stride, padding, dilation, groups, pool);
  picture_strides(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, c.x_stride);
  const int64_t sizes[4] = {c.batch, filters, c.pooled_height(), c.pooled_width()};
  layout_strides(sizes, layout, c.y_stride);
  const OnDevice guard(x);
  const Tensor y = new_picture(x, sizes, c.y_stride);
  if (y.numel() == 0) return y;
  c.y = y.mutable_data_ptr(), c.relu = relu, c.kept = kept;
  c.bias = bias ? address(*bias) : nullptr;
  c.filter_offsets = typed<const int32_t>(filter_offsets);
  c.channels = typed<const int32_t>(channels);
  const Launch launch = launcher(x);
  with_type<float, Bf16, Half>(kOp, "x", x,
                               [&](auto zero) { run<decltype(zero)>(c, x, values, launch); });
  return y;
}

}  // namespace
}  // namespace liveweight::cuda::kernelwise

LW_CUDA_LIBRARY(m) {
  m.impl("kernelwise_conv2d", TORCH_BOX(&liveweight::cuda::kernelwise::kernelwise_conv2d_cuda));
}
