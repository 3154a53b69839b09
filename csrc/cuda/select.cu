// mass_mask, signal_mask and top_k_mask for CUDA: checks, allocation, registration.
#include "select_flat.cuh"
#include "select_rows.cuh"
#include "torch_ops.cuh"

#undef NDEBUG  // the assertion of a captured selection must stay
#include <cassert>
#include <stdexcept>
#include <tuple>

namespace liveweight::cuda {
namespace {

using Index = unsigned long long;
constexpr int64_t kSmallRow = 1 << 14;

__global__ void set_index(Index* to, Index value) {
  if (threadIdx.x == 0) *to = value;
}

#if defined(__CUDACC__)
__global__ void assert_scores_are_valid(const Index* first_bad) {
  assert(*first_bad == kNoIndex && "liveweight: NaN, or a negative or infinite score of mass_mask");
}
#endif

// What a kernel left in first_bad. Under capture nothing may wait for the GPU: the graph gets a
// device-side assertion instead, and kNoIndex is returned.
Index read_first_bad(const Launch& launch, const Index* first_bad) {
#if defined(__CUDACC__)
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  Launch::check(cudaStreamIsCapturing(launch.stream, &capture));
  if (capture != cudaStreamCaptureStatusNone) {
    launch(assert_scores_are_valid, Shape{grid(1), 1}, first_bad);
    return kNoIndex;
  }
  Index found = kNoIndex;
  Launch::check(
      cudaMemcpyAsync(&found, first_bad, sizeof found, cudaMemcpyDeviceToHost, launch.stream));
  Launch::check(cudaStreamSynchronize(launch.stream));
  return found;
#else
  (void)launch;
  return *first_bad;
#endif
}

// Shared memory that a block may have here.
int shared_limit(const Tensor& x) {
#if defined(__CUDACC__)
  int bytes = 0;
  Launch::check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                       x.get_device_index()));
  return bytes;
#else
  (void)x;
  return kSharedLimit;
#endif
}

[[noreturn]] void refuse(const char* op, const char* expected, Index row, const char* held) {
  throw std::invalid_argument(std::string(op) + ": scores must " + expected + ", row " +
                              std::to_string(row) + " holds " + held);
}

Tensor new_mask(const Tensor& like, bool packed) {
  const int64_t rows = like.size(0), columns = like.size(1);
  return packed ? empty(like, {rows, (columns + 31) / 32}, ScalarType::Int)
                : empty(like, {rows, columns}, ScalarType::Bool);
}

uint8_t* bytes_of(const Tensor& mask) {
  return mask.scalar_type() == ScalarType::Bool ? reinterpret_cast<uint8_t*>(typed<bool>(mask))
                                                : nullptr;
}

uint32_t* words_of(const Tensor& mask) {
  return mask.scalar_type() == ScalarType::Int
             ? reinterpret_cast<uint32_t*>(typed<int32_t>(mask))
             : nullptr;
}

void check_length(const char* op, int64_t columns) {
  // Columns are counted in int, up to a whole unit per warp past the end.
  constexpr int64_t most = (int64_t(1) << 31) - 2 * kWarpLanes * kUnitColumns;
  require(columns <= most, op, "a row of ", columns, " scores is too long, expected at most ",
          most);
}

// Runs the row kernel; the first row that it refused, or kNoIndex. `like`: its device.
template <class Rule, class Source>
Index select_rows_of(const Source& source, int64_t rows, const Rule& rule, RowMask mask,
                     const Tensor& like) {
  const Launch launch = launcher(like);
  const Tensor first_bad = empty(like, {1}, ScalarType::Long);
  mask.bad_row = reinterpret_cast<Index*>(typed<int64_t>(first_bad));
  launch(set_index, Shape{grid(1), kWarpLanes}, mask.bad_row, kNoIndex);
  const RowPlan plan = plan_rows<Rule>(rows, source.columns, shared_limit(like));
  select_each_row(source, rule, plan, mask, launch);
  return read_first_bad(launch, mask.bad_row);
}

template <class Rule>
Index select_scores(const char* op, const Tensor& scores, const Rule& rule, const Tensor& mask) {
  const int64_t columns = scores.size(1);
  check_length(op, columns);
  const bool aligned = misalignment(scores) == 0 && columns % kColumns == 0;
  const StoredScores source{typed<const float>(scores), int(columns), aligned};
  const RowMask to{int(columns), bytes_of(mask), words_of(mask), nullptr, nullptr};
  return select_rows_of(source, scores.size(0), rule, to, scores);
}

Tensor mass_mask_cuda(const Tensor& scores, double alpha, bool authors_ties, bool packed) {
  const char* op = "mass_mask";
  check_tensor(op, "scores", scores, ScalarType::Float, {-1, -1}, scores);
  require(alpha >= 0 && alpha <= 1, op, "alpha must be in [0, 1], got ", alpha);
  const OnDevice guard(scores);
  Tensor mask = new_mask(scores, packed);
  if (scores.numel() == 0) return mask;
  const Index bad = select_scores(op, scores, ByMass{alpha, authors_ties}, mask);
  if (bad != kNoIndex) {
    refuse(op, "be finite and >= 0", bad, "a negative, NaN or infinite one");
  }
  return mask;
}

std::tuple<Tensor, Tensor> signal_mask_cuda(const Tensor& weight, const Tensor& activity,
                                            const std::optional<Tensor>& bias, double alpha,
                                            bool authors_ties, bool packed) {
  const char* op = "signal_mask";
  check_tensor(op, "weight", weight, weight.scalar_type(), {-1, -1}, weight);
  const int64_t rows = weight.size(0), inputs = weight.size(1);
  check_tensor(op, "activity", activity, ScalarType::Float, {inputs}, weight);
  check_tensor(op, "bias", bias, weight.scalar_type(), {rows}, weight);
  require(alpha >= 0 && alpha <= 1, op, "alpha must be in [0, 1], got ", alpha);
  check_length(op, inputs + 1);
  const OnDevice guard(weight);
  Tensor mask = new_mask(weight, packed);
  Tensor bias_mask = empty(weight, {bias ? rows : 0}, ScalarType::Bool);
  const int columns = int(inputs) + (bias ? 1 : 0);
  if (rows * columns == 0) return {mask, bias_mask};
  const RowMask to{int(inputs), bytes_of(mask), words_of(mask),
                   bias ? bytes_of(bias_mask) : nullptr, nullptr};
  Index bad = kNoIndex;
  with_type<float, Bf16, Half>(op, "weight", weight, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = inputs % kColumns == 0 && misalignment(activity) == 0 &&
                         misalignment(weight) % (kColumns * sizeof(T)) == 0;
    const Signals<T> source{typed<const T>(weight), typed<const float>(activity),
                            typed<const T>(bias), int(inputs), columns, aligned};
    bad = select_rows_of(source, rows, ByMass{alpha, authors_ties}, to, weight);
  });
  if (bad != kNoIndex) {
    throw std::invalid_argument("signal_mask: |weight| * activity must be finite and >= 0, row " +
                                std::to_string(bad) + " holds a negative, NaN or infinite one");
  }
  return {mask, bias_mask};
}

// Runs the selection over all scores; the first index of a NaN, or kNoIndex.
template <class T, class Key>
Index select_all(const Tensor& scores, int64_t k, const std::optional<Tensor>& sizes,
                 const Tensor& mask, bool packed) {
  const Launch launch = launcher(scores);
  // Bytes have no words that end with a row, so they are written as one row.
  const int64_t rows = packed ? scores.size(0) : 1;
  const FlatScores<T> from{typed<const T>(scores), typed<const int64_t>(sizes), rows,
                           scores.numel() / rows};
  const Tensor state = empty(scores, {int64_t(sizeof(FlatState<Key>) / 8)}, ScalarType::Long);
  const Tensor counts = empty(scores, {kDigits}, ScalarType::Long);
  const Tensor ties = empty(scores, {kFlatMaskWarps}, ScalarType::Long);
  const FlatWork<Key> work{reinterpret_cast<FlatState<Key>*>(typed<int64_t>(state)),
                           reinterpret_cast<Index*>(typed<int64_t>(counts)),
                           reinterpret_cast<long long*>(typed<int64_t>(ties))};
  const FlatMask to{bytes_of(mask), words_of(mask)};
  select_flat<Key>(from, k, work, to, launch);
  return read_first_bad(launch, &work.state->bad);
}

Tensor top_k_mask_cuda(const Tensor& scores, int64_t k, bool per_row,
                       const std::optional<Tensor>& sizes, bool packed) {
  const char* op = "top_k_mask";
  const bool wide = scores.scalar_type() == ScalarType::Double && !per_row;
  check_tensor(op, "scores", scores, wide ? ScalarType::Double : ScalarType::Float, {-1, -1},
               scores);
  const int64_t rows = scores.size(0), columns = scores.size(1);
  check_tensor(op, "sizes", sizes, ScalarType::Long, {rows, columns}, scores);
  require(k >= 0, op, "k must be >= 0, got ", k);
  require(!per_row || !sizes, op, "sizes go with one k for all rows");
  const OnDevice guard(scores);
  Tensor mask = new_mask(scores, packed);
  if (scores.numel() == 0) return mask;
  Index bad;
  // One block needs one launch instead of ten.
  const bool small = !wide && !sizes && rows == 1 && columns <= kSmallRow;
  if (per_row || small) {
    bad = select_scores(op, scores, ByCount{k < columns ? k : columns}, mask);
  } else {
    bad = wide ? select_all<double, uint64_t>(scores, k, sizes, mask, packed)
               : select_all<float, uint32_t>(scores, k, sizes, mask, packed);
    bad = bad == kNoIndex ? bad : bad / Index(columns);
  }
  if (bad != kNoIndex) refuse(op, "not be NaN", bad, "one");
  return mask;
}

}  // namespace
}  // namespace liveweight::cuda

LW_CUDA_LIBRARY(m) {
  m.impl("mass_mask", TORCH_BOX(&liveweight::cuda::mass_mask_cuda));
  m.impl("signal_mask", TORCH_BOX(&liveweight::cuda::signal_mask_cuda));
  m.impl("top_k_mask", TORCH_BOX(&liveweight::cuda::top_k_mask_cuda));
}
