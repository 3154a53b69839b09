// y = act(x W^T + b) for W in compressed sparse rows, and its gradients.
//
// Batches are turned into panels (panels.h), so that one kept weight is one broadcast and a few
// multiply-adds. A panel beyond the second-level cache is cut into tiles of columns: all rows of a
// block use one tile before they go on to the next. A single sample has no lanes to share: there the
// input is gathered. The order of a sum never depends on threads.
#include "dispatch.h"
#include "panels.h"

namespace liveweight {

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
LW_DECLARE(void linear_dots(const float* grad, const float* x, int width, SparseRows w, int64_t begin,
                            int64_t end, bool add, float* out))

namespace liveweight::LW_ISA {

constexpr int kBlockRows = 128;

void linear_fill(const float* x, int64_t K, Panel panel, int64_t begin, int64_t end, float* out) {
  fill_panel(x + panel.first * K, K, panel.count, panel.width, begin, end, out);
}

// First entry at or after `at` whose column is not below limit.
LW_INLINE int32_t skip_below(const int32_t* columns, int32_t at, int32_t end, int32_t limit) {
  for (; at + 16 <= end; at += 16) {
    int32_t below = 0;
    for (int i = 0; i < 16; ++i) below += columns[at + i] < limit;
    if (below < 16) return at + below;
  }
  while (at < end && columns[at] < limit) ++at;
  return at;
}

// sums[0 .. kWidth) (+)= sum over the entries [at, end) of value * panel row.
template <int kWidth>
LW_INLINE void add_entries(const float* panel, SparseRows w, int32_t at, int32_t end, bool add,
                           float* sums) {
  constexpr int kStep = kWidth < kLanes ? kWidth : kLanes;
  constexpr int kParts = kWidth / kStep;
  constexpr int kChains = kParts >= 4 ? 1 : 4 / kParts;  // independent sums hide the FMA's latency
  Lanes<kStep> acc[kChains][kParts] = {};
  for (; at + kChains <= end; at += kChains) {
#pragma GCC unroll 8
    for (int chain = 0; chain < kChains; ++chain) {
      const float* row = panel + int64_t(w.columns[at + chain]) * kWidth;
      const float value = w.values[at + chain];
#pragma GCC unroll 16
      for (int part = 0; part < kParts; ++part) {
        acc[chain][part] += value * load_lanes<kStep>(row + part * kStep);
      }
    }
  }
  for (; at < end; ++at) {
    const float* row = panel + int64_t(w.columns[at]) * kWidth;
#pragma GCC unroll 16
    for (int part = 0; part < kParts; ++part) {
      acc[0][part] += w.values[at] * load_lanes<kStep>(row + part * kStep);
    }
  }
#pragma GCC unroll 16
  for (int part = 0; part < kParts; ++part) {
    Lanes<kStep> sum = acc[0][part];
#pragma GCC unroll 8
    for (int chain = 1; chain < kChains; ++chain) sum += acc[chain][part];
    if (add) sum += load_lanes<kStep>(sums + part * kStep);
    store_lanes<kStep>(sums + part * kStep, sum);
  }
}

// sums [rows, width] to y[m, n] = act(sums + bias), rows being n.
LW_INLINE void finish_rows(const float* sums, int count, int width, int64_t first, int rows,
                           const float* bias, bool relu, float* y, int64_t N) {
  const float low = relu ? 0.0f : -__builtin_inff();
  for (int m = 0; m < count; m += 4) {
    const int samples = count - m < 4 ? count - m : 4;
    for (int r = 0; r < rows; r += 4) {
      const int some = rows - r < 4 ? rows - r : 4;
      Lanes<4> v[4] = {}, shift = {};
      for (int i = 0; i < some; ++i) v[i] = load_lanes<4>(sums + (r + i) * width + m);
      if (bias) __builtin_memcpy(&shift, bias + first + r, size_t(some) * sizeof(float));
      transpose4(v);
      for (int i = 0; i < samples; ++i) {
        v[i] += shift;
        v[i] = v[i] < low ? Lanes<4>{low, low, low, low} : v[i];
        __builtin_memcpy(y + (m + i) * N + first + r, &v[i], size_t(some) * sizeof(float));
      }
    }
  }
}

template <int kWidth>
void rows_of_panel(const float* panel, int count, SparseRows w, int64_t K, int64_t tile, int64_t begin,
                   int64_t end, const float* bias, bool relu, float* sums, float* y, int64_t N) {
  int32_t at[kBlockRows];
  for (int64_t n0 = begin; n0 < end; n0 += kBlockRows) {
    const int rows = int(end - n0 < kBlockRows ? end - n0 : kBlockRows);
    if (tile >= K) {
      for (int r = 0; r < rows; ++r) {
        const int32_t* entry = w.offsets + n0 + r;
        add_entries<kWidth>(panel, w, entry[0], entry[1], false, sums + r * kWidth);
      }
    } else {
      for (int r = 0; r < rows; ++r) at[r] = w.offsets[n0 + r];
      for (int64_t k = 0; k < K; k += tile) {
        for (int r = 0; r < rows; ++r) {
          const int32_t stop = skip_below(w.columns, at[r], w.offsets[n0 + r + 1], int32_t(k + tile));
          add_entries<kWidth>(panel, w, at[r], stop, k > 0, sums + r * kWidth);
          at[r] = stop;
          // The next tile comes back here after all rows of the block: too far for the hardware.
          for (int line = 0; line <= 16; line += 16) {
            prefetch(w.values + stop + line);
            prefetch(w.columns + stop + line);
          }
        }
      }
    }
    finish_rows(sums, count, kWidth, n0, rows, bias, relu, y, N);
  }
}

void linear_rows(const float* panel, Panel shape, SparseRows w, int64_t K, int64_t tile, int64_t begin,
                 int64_t end, const float* bias, bool relu, float* sums, float* y, int64_t N) {
  y += shape.first * N;
  auto run = shape.width == 64   ? rows_of_panel<64>
             : shape.width == 32 ? rows_of_panel<32>
             : shape.width == 16 ? rows_of_panel<16>
             : shape.width == 8  ? rows_of_panel<8>
                                 : rows_of_panel<4>;
  run(panel, shape.count, w, K, tile, begin, end, bias, relu, sums, y, N);
}

void linear_gather(const float* x, SparseRows w, int64_t begin, int64_t end, const float* bias,
                   bool relu, float* y) {
  for (int64_t n = begin; n < end; ++n) {
    int32_t at = w.offsets[n];
    const int32_t stop = w.offsets[n + 1];
    Vec sum = zero(), other = zero();
    for (; at + 2 * kLanes <= stop; at += 2 * kLanes) {
      sum = fma(load(w.values + at), gather(x, w.columns + at), sum);
      other = fma(load(w.values + at + kLanes), gather(x, w.columns + at + kLanes), other);
    }
    for (; at < stop; at += kLanes) {
      const int some = stop - at < kLanes ? stop - at : kLanes;
      sum = fma(load_first(w.values + at, some), gather(x, w.columns + at, some), sum);
    }
    const float value = reduce_add(sum + other) + (bias ? bias[n] : 0.0f);
    y[n] = relu && value < 0.0f ? 0.0f : value;
  }
}

template <int kWidth>
void dots_of_panel(const float* grad, const float* x, SparseRows w, int64_t begin, int64_t end,
                   bool add, float* out) {
  constexpr int kParts = kWidth / kLanes;
  for (int64_t n = begin; n < end; ++n) {
    Vec g[kParts];
    for (int part = 0; part < kParts; ++part) g[part] = load(grad + n * kWidth + part * kLanes);
    for (int32_t at = w.offsets[n]; at < w.offsets[n + 1]; ++at) {
      const float* row = x + int64_t(w.columns[at]) * kWidth;
      Vec sum = g[0] * load(row);
      for (int part = 1; part < kParts; ++part) sum = fma(g[part], load(row + part * kLanes), sum);
      out[at] = reduce_add(sum) + (add ? out[at] : 0.0f);
    }
  }
}

// out[at] (+)= dot of grad row n and x row columns[at], both panels, for the entries of rows n.
void linear_dots(const float* grad, const float* x, int width, SparseRows w, int64_t begin,
                 int64_t end, bool add, float* out) {
  auto run = width == 64 ? dots_of_panel<64> : width == 32 ? dots_of_panel<32> : dots_of_panel<16>;
  run(grad, x, w, begin, end, add, out);
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {
namespace {

constexpr int64_t kBlockRows = plain::kBlockRows;
constexpr double kParallelWork = 4e5;  // multiply-adds that outweigh waking the threads

struct Pattern {
  SparseRows rows;
  int64_t count, kept;
};

// Guards memory at the cost of one look per row: columns rise inside a row (the format checks that
// once), so the first and the last of a row bound the others.
Pattern check_pattern(const char* op, const Tensor& values, const Tensor& offsets, const Tensor& columns,
                      int64_t width) {
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
int64_t pick_tile(int64_t K, const Pattern& w, int width) {
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
    const bool small = double(w.kept) * double(M) < kParallelWork;
    const int64_t threads = small ? 1 : int64_t(torch::stable::get_num_threads());
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

// The transposed pattern, columns as rows, by counting: entries of a column keep the order of rows.
struct Transposed {
  Workspace<int32_t> offsets, rows;
  Workspace<float> values;

  Transposed(const Pattern& w, int64_t width) : offsets(width + 2), rows(w.kept), values(w.kept) {
    std::fill(offsets.data(), offsets.data() + width + 2, 0);
    for (int64_t i = 0; i < w.kept; ++i) ++offsets[w.rows.columns[i] + 2];
    for (int64_t k = 2; k <= width; ++k) offsets[k] += offsets[k - 1];
    for (int64_t n = 0; n < w.count; ++n) {
      for (int32_t i = w.rows.offsets[n]; i < w.rows.offsets[n + 1]; ++i) {
        const int32_t at = offsets[w.rows.columns[i] + 1]++;
        rows[at] = int32_t(n);
        values[at] = w.rows.values[i];
      }
    }
  }
};

Tensor unstructured_linear(const Tensor& x, const Tensor& values, const Tensor& row_offsets,
                           const Tensor& columns, const std::optional<Tensor>& bias, bool relu) {
  const char* op = "unstructured_linear";
  Linear job{};
  job.x = checked_data<float>(op, "x", x, 2, ScalarType::Float);
  job.M = x.size(0);
  job.K = x.size(1);
  job.w = check_pattern(op, values, row_offsets, columns, job.K);
  job.N = job.w.count;
  if (bias) {
    job.bias = checked_data<float>(op, "bias", *bias, 1, ScalarType::Float);
    LW_CHECK(bias->numel() == job.N, op, ": expected bias [", job.N, "], got ", shape_of(*bias));
  }
  job.relu = relu;
  Tensor y = torch::stable::new_empty(x, {job.M, job.N});
  job.y = static_cast<float*>(y.mutable_data_ptr());
  job.run();
  return y;
}

Tensor unstructured_linear_grad_x(const Tensor& grad, const Tensor& values, const Tensor& row_offsets,
                                  const Tensor& columns, int64_t in_features) {
  const char* op = "unstructured_linear_grad_x";
  Linear job{};
  job.x = checked_data<float>(op, "grad", grad, 2, ScalarType::Float);
  const Pattern w = check_pattern(op, values, row_offsets, columns, in_features);
  LW_CHECK(grad.size(1) == w.count, op, ": expected grad [M, ", w.count, "], got ", shape_of(grad));
  LW_CHECK(in_features >= 0, op, ": in_features must be >= 0, got ", in_features);
  Tensor out = torch::stable::new_empty(grad, {grad.size(0), in_features});
  Transposed turned(w, in_features);
  job.M = grad.size(0);
  job.K = w.count;
  job.N = in_features;
  job.w = {{turned.values.data(), turned.offsets.data(), turned.rows.data()}, in_features, w.kept};
  job.y = static_cast<float*>(out.mutable_data_ptr());
  job.run();
  return out;
}

Tensor unstructured_linear_grad_values(const Tensor& grad, const Tensor& x, const Tensor& row_offsets,
                                       const Tensor& columns) {
  const char* op = "unstructured_linear_grad_values";
  constexpr int64_t kBatch = 512;  // samples turned into panels at a time
  const float* x_data = checked_data<float>(op, "x", x, 2, ScalarType::Float);
  const float* grad_data = checked_data<float>(op, "grad", grad, 2, ScalarType::Float);
  Tensor out = torch::stable::new_zeros(x, {columns.numel()});
  const int64_t M = x.size(0), K = x.size(1);
  const Pattern w = check_pattern(op, out, row_offsets, columns, K);
  const int64_t N = w.count;
  LW_CHECK(grad.size(0) == M && grad.size(1) == N, op, ": expected grad [", M, ", ", N, "], got ",
           shape_of(grad));
  float* out_data = static_cast<float*>(out.mutable_data_ptr());
  const bool small = double(w.kept) * double(M) < kParallelWork;
  const int64_t threads = small ? 1 : int64_t(torch::stable::get_num_threads());
  const int64_t lanes = (std::min(M, kBatch) + 63) / 64 * 64;
  Workspace<float> x_panels(K * lanes), grad_panels(N * lanes);
  for (int64_t first = 0; first < M; first += kBatch) {
    const std::vector<Panel> panels = split_panels(first, std::min(first + kBatch, M), 16);
    parallel_for(int64_t(panels.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Panel& panel = panels[size_t(i)];
        const int64_t at = panel.first - first;
        LW_SELECT(linear_fill)(x_data, K, panel, 0, K, x_panels.data() + at * K);
        LW_SELECT(linear_fill)(grad_data, N, panel, 0, N, grad_panels.data() + at * N);
      }
    });
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      const int64_t from = share_rows(w.rows.offsets, N, begin, threads);
      const int64_t to = share_rows(w.rows.offsets, N, end, threads);
      for (const Panel& panel : panels) {
        const int64_t at = panel.first - first;
        LW_SELECT(linear_dots)(grad_panels.data() + at * N, x_panels.data() + at * K, panel.width,
                               w.rows, from, to, panel.first > 0, out_data);
      }
    });
  }
  return out;
}

}  // namespace
}  // namespace liveweight

STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) {
  m.impl("unstructured_linear", TORCH_BOX(&liveweight::unstructured_linear));
  m.impl("unstructured_linear_grad_x", TORCH_BOX(&liveweight::unstructured_linear_grad_x));
  m.impl("unstructured_linear_grad_values", TORCH_BOX(&liveweight::unstructured_linear_grad_values));
}
#endif  // LW_BASE
