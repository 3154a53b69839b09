// Launchers and registration of delta_linear and its kin for CUDA.
#include "delta_linear.cuh"

#include "delta_dense.cuh"
#include "torch_ops.cuh"

namespace liveweight::cuda {
namespace {

using Ints = std::vector<int64_t>;
constexpr int kWholePasses = 8;

// The tensors and numbers of a weight, as every op here takes them.
struct Parts {
  const Tensor &values, &deltas, &starts, &order, &offsets;
  const Ints &shape, &layout;
};

// The weight, its sizes checked; what the indices say is formats/delta.py's to vouch for.
DeltaWeight check_weight(const char* op, const Parts& parts) {
  require(parts.shape.size() == 2 && parts.layout.size() == 5, op,
          "expected shape [N, K] and layout [bits, lanes, part, head, classes]");
  DeltaWeight w{};
  w.rows = parts.shape[0];
  w.columns = parts.shape[1];
  const int64_t bits = parts.layout[0], lanes = parts.layout[1], part = parts.layout[2];
  require(w.rows >= 0 && w.columns >= 0 && w.rows < int64_t(1) << 31, op, "no weight has shape [",
          w.rows, ", ", w.columns, "]");
  require(bits == 4 || bits == 5 || bits == 6 || bits == 8, op, "bits must be 4, 5, 6 or 8, got ",
          bits);
  require(lanes >= 1 && lanes <= kLaneCount && (lanes & (lanes - 1)) == 0, op,
          "lanes must be a power of two up to 32, got ", lanes);
  require(part >= 8 && part <= 32768 && part % 8 == 0, op,
          "part must be a multiple of 8 from 8 to 32768, got ", part);
  require(parts.layout[3] == 0 || parts.layout[3] == kChunkGroups, op, "head must be 0 or 4, got ",
          parts.layout[3]);
  require(parts.layout[4] == 1 || (parts.layout[4] == 8 && lanes >= 8), op,
          "classes must be 1, or 8 with 8 lanes or more, got ", parts.layout[4], " with ", lanes);
  const int64_t count = w.columns ? div_up(w.columns, part) : 1;
  const int64_t slices = div_up(w.rows * lanes, kLaneCount);
  require(count <= 65535 && slices * count < int64_t(1) << 31, op, "too many slices: ", slices,
          " in ", count, " parts");
  const Tensor& like = parts.values;
  check_tensor(op, "values", parts.values, parts.values.scalar_type(), {-1}, like, true);
  check_tensor(op, "deltas", parts.deltas, ScalarType::Int, {-1}, like);
  check_tensor(op, "starts", parts.starts, ScalarType::Short, {slices * count, kLaneCount}, like);
  check_tensor(op, "order", parts.order, ScalarType::Int, {slices * count, kLaneCount / lanes},
               like);
  check_tensor(op, "offsets", parts.offsets, ScalarType::Int, {slices * count + 1, 2}, like);
  w.lanes = int(lanes);
  w.part = int(part);
  w.parts = int(count);
  w.head = int(parts.layout[3]);
  w.classes = int(parts.layout[4]);
  w.slices = int(slices);
  w.values = static_cast<const uint16_t*>(address(parts.values));
  w.deltas = static_cast<const uint32_t*>(address(parts.deltas));
  w.starts = typed<const int16_t>(parts.starts);
  w.order = typed<const int32_t>(parts.order);
  w.offsets = typed<const int32_t>(parts.offsets);
  return w;
}

// Shared memory that a block of this GPU may have.
int shared_limit(const Tensor& x) {
#if defined(__CUDACC__)
  int bytes = 0;
  Launch::check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                       x.get_device_index()));
  return bytes - 1024;  // less what the kernels declare
#else
  (void)x;
  return kSharedLimit;
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

Tensor expand(const DeltaWeight& w, int bits, const Tensor& values, const Launch& launch) {
  const Tensor dense = empty(values, {w.rows, w.columns}, values.scalar_type());
  if (dense.numel()) {
    delta_to_dense(w, bits, static_cast<uint16_t*>(dense.mutable_data_ptr()), launch);
  }
  return dense;
}

// Whether passes over the weight take less time than writing W, reading it and multiplying. A pass
// of 8 tokens handles 2.9 entries a clock, 5.7 where columns have classes (delta_linear.cuh): the
// time of 6.4 or 3.3 bytes of memory traffic each. Up to 8 tokens there is one pass.
bool passes_pay(const DeltaWeight& w, int64_t tokens, int64_t entries) {
  const double dense = 4.0 * double(w.rows) * double(w.columns) + 2.7 * double(entries);
  return tokens <= kWholePasses ||
         double(div_up(tokens, kWholePasses)) * (w.classes > 1 ? 3.3 : 6.4) * double(entries) <=
             dense;
}

Tensor delta_linear_cuda(const Tensor& x, const Tensor& values, const Tensor& deltas,
                         const Tensor& starts, const Tensor& order, const Tensor& offsets,
                         Ints shape, Ints layout, std::optional<Tensor> bias, int64_t activation) {
  constexpr const char* kOp = "delta_linear";
  DeltaWeight w = check_weight(kOp, {values, deltas, starts, order, offsets, shape, layout});
  check_tensor(kOp, "x", x, values.scalar_type(), {-1, w.columns}, values);
  check_tensor(kOp, "bias", bias, values.scalar_type(), {w.rows}, values);
  require(activation >= 0 && activation < kActivations, kOp,
          "activation must be 0, 1, 2 or 3, got ", activation);
  const OnDevice guard(x);
  const Launch launch = launcher(x);
  const int bits = int(layout[0]);
  Tensor y = empty(x, {x.size(0), w.rows}, x.scalar_type());
  with_type<Bf16, Half>(kOp, "x", x, [&](auto zero) {
    using T = decltype(zero);
    if (y.numel() == 0) return;
    if (!passes_pay(w, x.size(0), values.numel())) {
      y = linear(x, expand(w, bits, values, launch), bias);
      activate_all(typed<T>(y), y.numel(), int(activation), launch);
      return;
    }
    DeltaCall<T> call{};
    call.weight = w;
    call.x = typed<const T>(x);
    call.bias = typed<const T>(bias);
    call.y = typed<T>(y);
    call.tokens = x.size(0);
    call.activation = int(activation);
    std::optional<Tensor> partial;
    if (w.parts > 1) {
      partial = empty(x, {w.parts, call.tokens, w.rows}, ScalarType::Float);
      call.partial = typed<float>(*partial);
    }
    delta_linear(call, bits, shared_limit(x), launch);
  });
  return y;
}

Tensor delta_to_dense_cuda(const Tensor& values, const Tensor& deltas, const Tensor& starts,
                           const Tensor& order, const Tensor& offsets, Ints shape, Ints layout) {
  constexpr const char* kOp = "delta_to_dense";
  const DeltaWeight w = check_weight(kOp, {values, deltas, starts, order, offsets, shape, layout});
  with_type<Bf16, Half>(kOp, "values", values, [](auto) {});
  const OnDevice guard(values);
  return expand(w, int(layout[0]), values, launcher(values));
}

// For many samples: a product of dense matrices, read where weights are kept.
Tensor delta_linear_grad_values_cuda(const Tensor& grad, const Tensor& x, const Tensor& values,
                                     const Tensor& deltas, const Tensor& starts,
                                     const Tensor& order, const Tensor& offsets, Ints shape,
                                     Ints layout) {
  constexpr const char* kOp = "delta_linear_grad_values";
  const DeltaWeight w = check_weight(kOp, {values, deltas, starts, order, offsets, shape, layout});
  with_type<Bf16, Half>(kOp, "values", values, [](auto) {});
  check_tensor(kOp, "x", x, values.scalar_type(), {-1, w.columns}, values);
  check_tensor(kOp, "grad", grad, values.scalar_type(), {x.size(0), w.rows}, values);
  const OnDevice guard(values);
  const Tensor out = empty(values, {values.size(0)}, values.scalar_type());
  if (values.numel() == 0) return out;
  const Tensor dense = torch::stable::matmul(torch::stable::transpose(grad, 0, 1), x);
  delta_gather(w, int(layout[0]), static_cast<const uint16_t*>(address(dense)),
               static_cast<uint16_t*>(out.mutable_data_ptr()), launcher(values));
  return out;
}

}  // namespace
}  // namespace liveweight::cuda

LW_CUDA_LIBRARY(m) {
  m.impl("delta_linear", TORCH_BOX(&liveweight::cuda::delta_linear_cuda));
  m.impl("delta_linear_grad_values",
         TORCH_BOX(&liveweight::cuda::delta_linear_grad_values_cuda));
  m.impl("delta_to_dense", TORCH_BOX(&liveweight::cuda::delta_to_dense_cuda));
}
