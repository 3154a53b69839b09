// y = act(x W^T + b) for W in tiles of rows and columns with one-byte columns: the launcher.
//
// Batches are turned into panels (panels.h): one kept weight is then one broadcast and a few
// multiply-adds (unstructured_linear_panels.cpp). A few samples have too few lanes to share: weights
// are spread beside the input where many are kept (unstructured_linear_expand.cpp), or the input is
// gathered (unstructured_linear_gather.cpp). bf16 operands are added up in fp32; the result
// is rounded once. The order of a sum never depends on threads.
#include "unstructured_linear.h"

#include "activation.h"

#ifdef LW_BASE
namespace liveweight {
namespace {

constexpr int kGathered = 2;  // samples up to which gathering beats panels

// Density from which spreading the weights beats gathering (1 and 2 samples) or panels (3 and 4).
// AVX-512 spreads a vector in one instruction; elsewhere the other two are faster.
constexpr int kSpread = 4;
constexpr double kSpreadFrom[kSpread] = {0.35, 0.22, 0.3, 0.35};

struct Linear {
  const float* x;
  int64_t x_row, x_column;  // steps from sample to sample and from feature to feature
  int64_t M, K, N;
  Tiles w;
  const float* bias;
  int activation;
  float* y;
  int64_t y_row, y_column;

  int64_t padded() const { return w.along * w.columns; }

  void finish(float* sums, int64_t block, int64_t first, int samples, int width) const {
    const int64_t row = block * w.rows;
    const RowsOut out{bias ? bias + row : nullptr, y + first * y_row + row * y_column, y_row, y_column,
                      activation};
    LW_SELECT(linear_finish)(sums, samples, width, int(std::min(w.rows, N - row)), out);
  }

  void fill(const Panel& panel, int64_t begin, int64_t end, float* out) const {
    LW_SELECT(linear_fill)(x, x_row, x_column, K, panel, begin, end, out);
  }

  void run_blocks(const float* filled, const Panel& panel, int64_t begin, int64_t end, float* sums) const {
    for (int64_t block = begin; block < end; ++block) {
      LW_SELECT(linear_block)(filled, panel.width, w, block, sums);
      finish(sums, block, panel.first, panel.count, panel.width);
    }
  }

  // Each worker fills and uses panels of its own.
  void run_by_panel(const std::vector<Panel>& panels, int64_t threads) const {
    const int64_t count = int64_t(panels.size());
    parallel_for(count, (count + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      const int64_t width = panels[size_t(begin)].width;  // the first is the widest
      Workspace<float> filled(padded() * width), sums(w.rows * width);
      for (int64_t i = begin; i < end; ++i) {
        fill(panels[size_t(i)], 0, padded(), filled.data());
        run_blocks(filled.data(), panels[size_t(i)], 0, w.blocks, sums.data());
      }
    });
  }

  // Each worker takes a share of the blocks through panels of its own: filling them twice costs less
  // than waiting for each other and fetching what the other core has just written.
  void run_by_shares(const std::vector<Panel>& panels, int64_t threads) const {
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = share_blocks(w, begin, threads), last = share_blocks(w, end, threads);
      if (first == last) return;
      const int64_t width = panels[0].width;  // the first is the widest
      Workspace<float> filled(padded() * width), sums(w.rows * width);
      for (const Panel& panel : panels) {
        fill(panel, 0, padded(), filled.data());
        run_blocks(filled.data(), panel, first, last, sums.data());
      }
    });
  }

  // All panels are filled together; then each worker takes a share of the blocks through all of them.
  void run_by_blocks(const std::vector<Panel>& panels, int64_t threads) const {
    int64_t lanes = 0;
    for (const Panel& panel : panels) lanes += panel.width;
    Workspace<float> filled(padded() * lanes);
    parallel_for(padded(), (padded() + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      float* at = filled.data();
      for (const Panel& panel : panels) {
        fill(panel, begin, end, at);
        at += padded() * panel.width;
      }
    });
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      Workspace<float> sums(w.rows * 64);
      const float* at = filled.data();
      for (const Panel& panel : panels) {
        run_blocks(at, panel, share_blocks(w, begin, threads), share_blocks(w, end, threads), sums.data());
        at += padded() * panel.width;
      }
    });
  }

  bool spreads() const {
    return M <= kSpread && w.bits && cpu_isa() == Isa::avx512 &&
           double(kept_entries(w)) >= kSpreadFrom[M - 1] * double(N) * double(padded());
  }

  void run_few(int64_t threads) const {
    // Samples as rows of whole tiles, so that any column number names memory that is there.
    const bool copy = x_column != 1 || padded() != K;
    Workspace<float> rows(copy ? M * padded() : 0);
    for (int64_t m = 0; copy && m < M; ++m) {
      for (int64_t k = 0; k < K; ++k) rows[m * padded() + k] = x[m * x_row + k * x_column];
      std::fill(rows.data() + m * padded() + K, rows.data() + (m + 1) * padded(), 0.0f);
    }
    const auto kernel = spreads() ? LW_SELECT(linear_expand) : LW_SELECT(linear_gather);
    const float* from = copy ? rows.data() : x;
    const int64_t step = copy ? padded() : x_row;
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      Workspace<float> lanes(w.rows * M * 16), sums(w.rows * M);
      for (int64_t b = share_blocks(w, begin, threads); b < share_blocks(w, end, threads); ++b) {
        kernel(from, step, int(M), w, b, lanes.data(), sums.data());
        finish(sums.data(), b, 0, int(M), int(M));
      }
    });
  }

  void run() const {
    if (M == 0 || N == 0) return;
    // A gathered multiply-add takes as long as six in lanes.
    const int64_t threads = threads_for(double(kept_entries(w)) * double(M <= kGathered ? 6 * M : M));
    if (spreads() || M <= kGathered) return run_few(threads);
    const std::vector<Panel> panels = split_panels(0, M, 8);
    const int64_t count = int64_t(panels.size());
    const bool even = M % 64 == 0 && count % threads == 0;
    if (threads == 1 || even || count >= 4 * threads) return run_by_panel(panels, threads);
    // Filling a number costs about four multiply-adds.
    if (kept_entries(w) >= 16 * K * threads) return run_by_shares(panels, threads);
    run_by_blocks(panels, threads);
  }
};

// The numbers of a bf16 tensor as float32, in the same order.
void widen(const Bf16* from, int64_t count, float* out) {
  parallel_for(count, 1 << 16, [&](int64_t begin, int64_t end) {
    LW_SELECT(linear_widen)(from + begin, end - begin, out + begin);
  });
}

// Runs the job on bf16 x and bias (null: none) into bf16 y, the latter in the order of job.y_row.
void run_bf16(Linear job, const Bf16* x, const Bf16* bias, Bf16* y) {
  Workspace<float> wide_x(job.M * job.K), wide_bias(job.N), wide_y(job.M * job.N);
  widen(x, job.M * job.K, wide_x.data());
  widen(bias, bias ? job.N : 0, wide_bias.data());
  job.x = wide_x.data(), job.bias = bias ? wide_bias.data() : nullptr, job.y = wide_y.data();
  job.run();
  parallel_for(job.M * job.N, 1 << 16, [&](int64_t begin, int64_t end) {
    LW_SELECT(linear_narrow)(wide_y.data() + begin, end - begin, y + begin);
  });
}

Tensor unstructured_linear(const Tensor& x, const Tensor& values, const Tensor& columns,
                           const Tensor& segments, const Tensor& offsets, const Tensor& bits,
                           const std::vector<int64_t>& tile, int64_t out_features,
                           const std::optional<Tensor>& bias, int64_t activation, bool batch_last) {
  const char* op = "unstructured_linear";
  LW_CHECK(x.dim() == 2, op, ": expected 2-D x, got shape ", shape_of(x));
  const bool bf16 = x.scalar_type() == ScalarType::BFloat16;
  const ScalarType dtype = bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  Linear job{};
  job.M = x.size(0), job.K = x.size(1), job.N = out_features;
  const bool last = !x.is_contiguous();  // sample after sample in a feature
  const void* from = checked_data<void>(op, "x", last ? torch::stable::transpose(x, 0, 1) : x, 2, dtype);
  job.x_row = last ? 1 : job.K, job.x_column = last ? job.M : 1;
  job.w = check_tiles(op, values, columns, segments, offsets, tile, job.N, job.K, dtype);
  job.w.bits = check_bits(op, bits, job.w, columns.numel(), segments.size(0));
  const void* shift = bias ? checked_data<void>(op, "bias", *bias, 1, dtype) : nullptr;
  LW_CHECK(!bias || bias->numel() == job.N, op, ": expected bias [", job.N, "], got ", shape_of(*bias));
  LW_CHECK(activation >= 0 && activation < kActivations, op, ": unknown activation ", activation);
  job.activation = int(activation);
  Tensor y = torch::stable::new_empty(x, batch_last ? std::vector<int64_t>{job.N, job.M}
                                                    : std::vector<int64_t>{job.M, job.N});
  job.y_row = batch_last ? 1 : job.N, job.y_column = batch_last ? job.M : 1;
  if (bf16) {
    run_bf16(job, static_cast<const Bf16*>(from), static_cast<const Bf16*>(shift),
             static_cast<Bf16*>(y.mutable_data_ptr()));
  } else {
    job.x = static_cast<const float*>(from), job.bias = static_cast<const float*>(shift);
    job.y = static_cast<float*>(y.mutable_data_ptr());
    job.run();
  }
  return batch_last ? torch::stable::transpose(y, 0, 1) : y;
}

}  // namespace
}  // namespace liveweight

STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) {
  m.impl("unstructured_linear", TORCH_BOX(&liveweight::unstructured_linear));
}
#endif  // LW_BASE
