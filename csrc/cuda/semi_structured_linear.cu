// Launcher and registration of semi_structured_linear for CUDA; semi_structured_linear.cuh has the
// kernels.
#include "semi_structured_linear.cuh"

#include <utility>

#include "torch_ops.cuh"

namespace liveweight::cuda::two_of_four {
namespace {

constexpr const char* kOp = "semi_structured_linear";
constexpr int64_t kMostColumns = int64_t(1) << 30;  // the kernel counts columns in 32 bits

// x with rows that begin on 16-byte boundaries: x itself, or a copy with padded rows.
template <typename T>
Tensor aligned_rows(const Tensor& x, const Launch& launch) {
  const int64_t tokens = x.size(0), K = x.size(1), padded = divide_up(K, 8) * 8;
  if (padded == K && misalignment(x) == 0) return x;
  const Tensor out = empty(x, {tokens, padded}, x.scalar_type());
  launch(align_rows<T>, few_elements(tokens * padded), typed<const T>(x), tokens, K, padded,
         typed<T>(out));
  return out;
}

template <typename T>
void run_passes(const Tensor& x, const FewTokens<T>& whole, int64_t tokens) {
  const Launch launch = launcher(x);
  const Tensor rows = whole.columns > 0 ? aligned_rows<T>(x, launch) : x;
  const int64_t K = rows.size(1);
  for (int64_t first = 0; first < tokens; first += kPassTokens) {
    FewTokens<T> in = whole;
    in.tokens = int(tokens - first < kPassTokens ? tokens - first : kPassTokens);
    const FewPlan plan = plan_few_tokens(in.tokens, in.rows, in.columns);
    in.columns = int(K);
    in.per_split = int(plan.per_split);
    in.x = typed<const T>(rows) + first * K;
    in.y = whole.y + first * in.y_token;
    const int64_t splits = plan.splits > 1 ? plan.splits : 0;
    const Tensor partials = empty(x, {splits, in.tokens, in.rows}, ScalarType::Float);
    in.partials = splits ? typed<float>(partials) : nullptr;
    semi_structured_few(in, plan, launch);
  }
}

// Any number of tokens, in passes of 64 that each read W; the Python side takes other ways before
// there are many passes.
Tensor linear_cuda(const Tensor& x, const Tensor& values, const Tensor& meta,
                   int64_t out_features, const std::optional<Tensor>& bias, int64_t activation,
                   bool batch_last) {
  const ScalarType dtype = x.scalar_type();
  check_tensor(kOp, "x", x, dtype, {-1, -1}, x);
  require(out_features >= 0, kOp, "out_features must be >= 0, got ", out_features);
  require(activation >= 0 && activation < kActivations, kOp, "activation must be 0 to 3, got ",
          activation);
  const int64_t M = x.size(0), N = out_features, K = x.size(1);
  require(K <= kMostColumns, kOp, "x must have at most ", kMostColumns, " columns, got ", K);
  const int64_t R = divide_up(N, kTileRows), U = divide_up(K, kTileColumns);
  check_tensor(kOp, "values", values, dtype, {R, U, kTileSteps, 32, 8}, x, true);
  check_tensor(kOp, "meta", meta, ScalarType::Int, {R, U, 32, 2}, x, true);
  check_tensor(kOp, "bias", bias, dtype, {N}, x);
  const OnDevice guard(x);
  const Tensor y = batch_last ? empty(x, {N, M}, dtype) : empty(x, {M, N}, dtype);
  with_type<Bf16, Half>(kOp, "x", x, [&](auto zero) {
    using T = decltype(zero);
    if (M == 0 || N == 0) return;
    FewTokens<T> in{};
    in.values = typed<const Vector16>(values);
    in.meta = typed<const unsigned char>(meta);
    in.bias = typed<const T>(bias);
    in.y = typed<T>(y);
    in.rows = N, in.columns = int(K), in.tile_rows = R, in.tile_columns = int(U);
    in.y_token = batch_last ? 1 : N, in.y_row = batch_last ? M : 1;
    in.activation = int(activation);
    run_passes(x, in, M);
  });
  return batch_last ? torch::stable::transpose(y, 0, 1) : y;
}

}  // namespace
}  // namespace liveweight::cuda::two_of_four

LW_CUDA_LIBRARY(m) {
  m.impl("semi_structured_linear", TORCH_BOX(&liveweight::cuda::two_of_four::linear_cuda));
}
