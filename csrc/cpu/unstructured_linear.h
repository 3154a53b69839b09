// What unstructured_linear and its gradients share: the pattern, its checks, and a product with panels.
#pragma once

#include "dispatch.h"
#include "panels.h"

namespace liveweight {

constexpr int kBlockRows = 128;  // rows of W whose sums are kept together

struct SparseRows {
  const float* values;
  const int32_t* offsets;
  const int32_t* columns;
};

}  // namespace liveweight

LW_DECLARE(void linear_fill(const float* x, int64_t K, Panel panel, int64_t begin, int64_t end, float* out))
LW_DECLARE(void linear_rows(const float* panel, Panel shape, SparseRows w, int64_t K, int64_t tile,
                            int64_t begin, int64_t end, const float* bias, bool relu, float* sums,
                            float* y, int64_t N))
LW_DECLARE(void linear_gather(const float* x, SparseRows w, int64_t begin, int64_t end,
                              const float* bias, bool relu, float* y))

#ifdef LW_BASE
namespace liveweight {

// Threads worth waking for so many multiply-adds.
inline int64_t threads_for(double work) {
  return work < 4e5 ? 1 : int64_t(torch::stable::get_num_threads());
}

struct Pattern {
  SparseRows rows;
  int64_t count, kept;
};

// Guards memory at the cost of one look per row: columns rise inside a row (the format checks that
// once), so the first and the last of a row bound the others.
inline Pattern check_pattern(const char* op, const Tensor& values, const Tensor& offsets,
                             const Tensor& columns, int64_t width) {
  Pattern p;
  p.rows.values = checked_data<float>(op, "values", values, 1, ScalarType::Float);
  p.rows.offsets = checked_data<int32_t>(op, "row_offsets", offsets, 1, ScalarType::Int);
  p.rows.columns = checked_data<int32_t>(op, "columns", columns, 1, ScalarType::Int);
  p.count = offsets.numel() - 1;
  p.kept = columns.numel();
  LW_CHECK(p.count >= 0, op, ": row_offsets is empty");
  LW_CHECK(values.numel() == p.kept, op, ": expected ", p.kept, " values, got ", values.numel());
  const int32_t* at = p.rows.offsets;
  bool ordered = at[0] == 0 && at[p.count] == p.kept;
  for (int64_t n = 0; n < p.count; ++n) ordered &= at[n] <= at[n + 1];
  LW_CHECK(ordered, op, ": row_offsets must rise from 0 to ", p.kept);
  bool inside = true;
  for (int64_t n = 0; n < p.count; ++n) {
    if (at[n] < at[n + 1]) inside &= p.rows.columns[at[n]] >= 0 && p.rows.columns[at[n + 1] - 1] < width;
  }
  LW_CHECK(inside, op, ": columns must be in [0, ", width, ")");
  return p;
}

// Columns of the panel that rows use together: all while the panel fits the second-level cache
// (Zen 4: 1 MB), else so many that a row has about 24 entries in a tile to keep the loop busy.
inline int64_t pick_tile(int64_t K, const Pattern& w, int width) {
  if (K * width * int64_t(sizeof(float)) <= 512 * 1024 || w.kept == 0) return K;
  const double density = double(w.kept) / (double(w.count) * double(K));
  const int64_t tile = int64_t(24.0 / density) / 32 * 32;
  return std::clamp<int64_t>(tile, 96, K);
}

struct Linear {
  const float* x;
  int64_t M, K, N;
  Pattern w;
  const float* bias;
  bool relu;
  float* y;

  void run_panel(const float* panel, Panel shape, int64_t begin, int64_t end, float* sums) const {
    LW_SELECT(linear_rows)(panel, shape, w.rows, K, pick_tile(K, w, shape.width), begin, end, bias,
                           relu, sums, y, N);
  }

  // Each worker fills and uses panels of its own.
  void run_by_panel(const std::vector<Panel>& panels, int64_t threads) const {
    const int64_t count = int64_t(panels.size());
    parallel_for(count, (count + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      const int64_t width = panels[size_t(begin)].width;  // the first is the widest
      Workspace<float> panel(K * width), sums(kBlockRows * width);
      for (int64_t i = begin; i < end; ++i) {
        LW_SELECT(linear_fill)(x, K, panels[size_t(i)], 0, K, panel.data());
        run_panel(panel.data(), panels[size_t(i)], 0, N, sums.data());
      }
    });
  }

  // All panels are filled together; then each worker takes a share of the rows through all of them.
  void run_by_rows(const std::vector<Panel>& panels, int64_t threads) const {
    int64_t lanes = 0;
    for (const Panel& panel : panels) lanes += panel.width;
    Workspace<float> filled(K * lanes);
    parallel_for(K, (K + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      float* at = filled.data();
      for (const Panel& panel : panels) {
        LW_SELECT(linear_fill)(x, K, panel, begin, end, at);
        at += K * panel.width;
      }
    });
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      Workspace<float> sums(kBlockRows * 64);
      const int64_t from = share_rows(w.rows.offsets, N, begin, threads);
      const int64_t to = share_rows(w.rows.offsets, N, end, threads);
      const float* at = filled.data();
      for (const Panel& panel : panels) {
        run_panel(at, panel, from, to, sums.data());
        at += K * panel.width;
      }
    });
  }

  void run() const {
    if (M == 0 || N == 0) return;
    // A gathered multiply-add takes as long as six in lanes.
    const int64_t threads = threads_for(double(w.kept) * double(M == 1 ? 6 : M));
    if (M == 1) {
      return parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
        const int64_t from = share_rows(w.rows.offsets, N, begin, threads);
        const int64_t to = share_rows(w.rows.offsets, N, end, threads);
        LW_SELECT(linear_gather)(x, w.rows, from, to, bias, relu, y);
      });
    }
    const std::vector<Panel> panels = split_panels(0, M, 4);
    const int64_t count = int64_t(panels.size());
    const bool even = M % 64 == 0 && count % threads == 0;
    if (threads == 1 || even || count >= 4 * threads) return run_by_panel(panels, threads);
    run_by_rows(panels, threads);
  }
};

}  // namespace liveweight
#endif  // LW_BASE
