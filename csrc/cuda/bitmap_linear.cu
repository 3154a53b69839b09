// Launchers and registration of bitmap_linear and its kin for CUDA.
#include "bitmap_linear.cuh"

#include <array>
#include <vector>

#include "bitmap_dense.cuh"
#include "bitmap_grad.cuh"
#include "torch_ops.cuh"

namespace liveweight::cuda {
namespace {

using Ints = std::vector<int64_t>;

// The tensors and numbers of a weight, as every op here takes them.
struct Parts {
  const Tensor &values, &bits, &offsets;
  const Ints& shape;
  int64_t most;
};

// The weight, its sizes checked; what bits and offsets say is formats/bitmap.py's to vouch for.
BitmapTiles check_weight(const char* op, const Parts& parts) {
  require(parts.shape.size() == 2 && parts.shape[0] >= 0 && parts.shape[1] >= 0, op,
          "shape must be [N, K]");
  const int64_t tiles =
      tiles_over(parts.shape[0], kTileRows) * tiles_over(parts.shape[1], kTileColumns);
  require(parts.shape[0] < int64_t(1) << 31 && parts.shape[1] < int64_t(1) << 26 &&
              tiles < int64_t(1) << 31,
          op, "shape [", parts.shape[0], ", ", parts.shape[1], "] is too large");
  require(parts.most >= 0 && parts.most <= kTileRows * kTileColumns / kPartValues, op,
          "most must be in [0, 512], got ", parts.most);
  const Tensor& like = parts.values;
  check_tensor(op, "values", like, like.scalar_type(), {-1}, like, true);
  with_type<Bf16, Half>(op, "values", like, [](auto) {});
  check_tensor(op, "bits", parts.bits, ScalarType::Int, {tiles, kTileWords}, like, true);
  check_tensor(op, "offsets", parts.offsets, ScalarType::Int, {tiles + 1}, like);
  return {static_cast<const uint16_t*>(address(parts.values)),
          static_cast<const uint32_t*>(address(parts.bits)), typed<const int32_t>(parts.offsets),
          int(parts.most)};
}

// What plans depend on, besides shapes.
Gpu gpu_of(const Tensor& x) {
#if defined(__CUDACC__)
  Gpu gpu{};
  const int device = x.get_device_index();
  Launch::check(cudaDeviceGetAttribute(&gpu.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                       device));
  Launch::check(cudaDeviceGetAttribute(&gpu.multiprocessors, cudaDevAttrMultiProcessorCount,
                                       device));
  return gpu;
#else
  (void)x;
  return {4, kSharedLimit};  // few, so that small weights meet every plan
#endif
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor expand(const BitmapTiles& tiles, const Tensor& values, const Ints& shape,
              const Launch& launch) {
  const Tensor dense = empty(values, {shape[0], shape[1]}, values.scalar_type());
  if (dense.numel()) {
    const BitmapShape size(shape[0], shape[1]);
    launch(bitmap_expand, dense_shape(tiles, size), tiles, size,
           static_cast<uint16_t*>(dense.mutable_data_ptr()));
  }
  return dense;
}

// x with whole tiles of columns on a 16-byte boundary: itself, or a copy.
template <typename T>
Tensor pad(const Tensor& x, const Launch& launch) {
  const int64_t columns = x.size(1), padded = tiles_over(columns, kTileColumns) * kTileColumns;
  if (columns == padded && misalignment(x) == 0) return x;
  const Tensor out = empty(x, {x.size(0), padded}, x.scalar_type());
  if (out.numel()) {
    launch(bitmap_pad<T>, Shape{grid(tiles_over(out.numel(), kFinishThreads)), kFinishThreads},
           typed<const T>(x), columns, typed<T>(out), padded, int64_t(out.numel()));
  }
  return out;
}

Tensor bitmap_linear_cuda(const Tensor& x, const Tensor& values, const Tensor& bits,
                          const Tensor& offsets, Ints shape, int64_t most,
                          std::optional<Tensor> bias, int64_t activation) {
  constexpr const char* kOp = "bitmap_linear";
  const BitmapTiles tiles = check_weight(kOp, {values, bits, offsets, shape, most});
  check_tensor(kOp, "x", x, values.scalar_type(), {-1, shape[1]}, values);
  check_tensor(kOp, "bias", bias, values.scalar_type(), {shape[0]}, values);
  require(activation >= 0 && activation < kActivations, kOp,
          "activation must be 0, 1, 2 or 3, got ", activation);
  const OnDevice guard(x);
  const Launch launch = launcher(x);
  Tensor y = empty(x, {x.size(0), shape[0]}, x.scalar_type());
  if (y.numel() == 0) return y;
  with_type<Bf16, Half>(kOp, "x", x, [&](auto zero) {
    using T = decltype(zero);
    if (x.size(0) > kMostTokens) {
      y = linear(x, expand(tiles, values, shape, launch), bias);
      activate_all(typed<T>(y), y.numel(), int(activation), launch);
      return;
    }
    const Tensor padded = pad<T>(x, launch);
    BitmapCall<T> call{};
    call.tiles = tiles;
    call.x = typed<const T>(padded);
    call.bias = typed<const T>(bias);
    call.y = typed<T>(y);
    call.tokens = int(x.size(0));
    call.rows = shape[0];
    call.columns = int(padded.size(1));
    call.activation = int(activation);
    call.plan = bitmap_plan(call.tokens, shape[0], shape[1], tiles.most, gpu_of(x));
    std::optional<Tensor> partial;
    if (call.plan.splits > 1) {
      partial = empty(x, {call.plan.splits, call.tokens, call.rows}, ScalarType::Float);
      call.partial = typed<float>(*partial);
    }
    bitmap_linear(call, launch);
  });
  return y;
}

Tensor bitmap_to_dense_cuda(const Tensor& values, const Tensor& bits, const Tensor& offsets,
                            Ints shape, int64_t most) {
  const BitmapTiles tiles =
      check_weight("bitmap_to_dense", {values, bits, offsets, shape, most});
  const OnDevice guard(values);
  return expand(tiles, values, shape, launcher(values));
}

// Few samples: sampled as it is multiplied. Many: a product of dense matrices, read where weights are
// kept.
Tensor bitmap_linear_grad_values_cuda(const Tensor& grad, const Tensor& x, const Tensor& values,
                                      const Tensor& bits, const Tensor& offsets, Ints shape,
                                      int64_t most) {
  constexpr const char* kOp = "bitmap_linear_grad_values";
  const BitmapTiles tiles = check_weight(kOp, {values, bits, offsets, shape, most});
  check_tensor(kOp, "x", x, values.scalar_type(), {-1, shape[1]}, values);
  check_tensor(kOp, "grad", grad, values.scalar_type(), {x.size(0), shape[0]}, values);
  const OnDevice guard(values);
  const Launch launch = launcher(values);
  const Tensor out = empty(values, {values.size(0)}, values.scalar_type());
  if (values.numel() == 0) return out;
  const BitmapShape size(shape[0], shape[1]);
  if (x.size(0) > kMostTokens || tiles_over(size.down, kDenseWarps) > 65535) {
    const Tensor dense = torch::stable::matmul(torch::stable::transpose(grad, 0, 1), x);
    launch(bitmap_gather, dense_shape(tiles, size), tiles, size,
           static_cast<const uint16_t*>(address(dense)),
           static_cast<uint16_t*>(out.mutable_data_ptr()));
    return out;
  }
  with_type<Bf16, Half>(kOp, "x", x, [&](auto zero) {
    using T = decltype(zero);
    const int tokens = int(x.size(0));
    bitmap_grad_values(
        BitmapGradCall<T>{tiles, size, typed<const T>(grad), typed<const T>(x), typed<T>(out),
                          tokens, int(tiles_over(tokens, 16)),
                          size.wide() && misalignment(x) == 0},
        launch);
  });
  return out;
}

}  // namespace
}  // namespace liveweight::cuda

LW_CUDA_LIBRARY(m) {
  m.impl("bitmap_linear", TORCH_BOX(&liveweight::cuda::bitmap_linear_cuda));
  m.impl("bitmap_linear_grad_values",
         TORCH_BOX(&liveweight::cuda::bitmap_linear_grad_values_cuda));
  m.impl("bitmap_to_dense", TORCH_BOX(&liveweight::cuda::bitmap_to_dense_cuda));
}
