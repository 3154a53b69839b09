// Gradients of unstructured_linear at sparse cost.
//
// To x: the forward product with the transposed pattern. To values: panels of both sides, one dot
// product for each kept weight. Each number has one owner, whose order of adding is fixed.
#include "unstructured_linear.h"

LW_DECLARE(void linear_dots(const float* grad, const float* x, int width, SparseRows w, int64_t begin,
                            int64_t end, bool add, float* out))

namespace liveweight::LW_ISA {

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

// The transposed pattern, columns as rows, by counting: entries of a column keep the order of rows.
struct Transposed {
  Workspace<int32_t> offsets, rows;
  Workspace<float> values;

  Transposed(const Pattern& w, int64_t width) : offsets(width + 2), rows(w.kept), values(w.kept) {
    std::fill(offsets.data(), offsets.data() + width + 2, 0);
    for (int64_t i = 0; i < w.kept; ++i) {
      const int32_t column = w.rows.columns[i];
      LW_CHECK(column >= 0 && column < width, "columns must be in [0, ", width, "), got ", column);
      ++offsets[column + 2];
    }
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

struct GradValues {
  const float *grad, *x;
  int64_t M, K, N, threads;
  Pattern w;
  float* out;

  // Adds the samples of these panels, of which `first` is the first.
  void add(const std::vector<Panel>& panels, int64_t first, float* grad_panels, float* x_panels) const {
    const int64_t count = int64_t(panels.size());
    parallel_for(count, (count + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Panel& panel = panels[size_t(i)];
        const int64_t at = panel.first - first;
        LW_SELECT(linear_fill)(x, K, panel, 0, K, x_panels + at * K);
        LW_SELECT(linear_fill)(grad, N, panel, 0, N, grad_panels + at * N);
      }
    });
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      const int64_t from = share_rows(w.rows.offsets, N, begin, threads);
      const int64_t to = share_rows(w.rows.offsets, N, end, threads);
      for (const Panel& panel : panels) {
        const int64_t at = panel.first - first;
        LW_SELECT(linear_dots)(grad_panels + at * N, x_panels + at * K, panel.width, w.rows, from, to,
                               panel.first > 0, out);
      }
    });
  }
};

Tensor unstructured_linear_grad_values(const Tensor& grad, const Tensor& x, const Tensor& row_offsets,
                                       const Tensor& columns) {
  const char* op = "unstructured_linear_grad_values";
  constexpr int64_t kBatch = 512;  // samples turned into panels at a time
  GradValues job{};
  job.x = checked_data<float>(op, "x", x, 2, ScalarType::Float);
  job.grad = checked_data<float>(op, "grad", grad, 2, ScalarType::Float);
  job.M = x.size(0);
  job.K = x.size(1);
  Tensor out = torch::stable::new_zeros(x, {columns.numel()});
  job.w = check_pattern(op, out, row_offsets, columns, job.K);
  job.N = job.w.count;
  LW_CHECK(grad.size(0) == job.M && grad.size(1) == job.N, op, ": expected grad [", job.M, ", ", job.N,
           "], got ", shape_of(grad));
  job.out = static_cast<float*>(out.mutable_data_ptr());
  job.threads = threads_for(double(job.w.kept) * double(job.M));
  const int64_t lanes = (std::min(job.M, kBatch) + 63) / 64 * 64;
  Workspace<float> x_panels(job.K * lanes), grad_panels(job.N * lanes);
  for (int64_t first = 0; first < job.M; first += kBatch) {
    const int64_t end = std::min(first + kBatch, job.M);
    job.add(split_panels(first, end, 16), first, grad_panels.data(), x_panels.data());
  }
  return out;
}

}  // namespace
}  // namespace liveweight

STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) {
  m.impl("unstructured_linear_grad_x", TORCH_BOX(&liveweight::unstructured_linear_grad_x));
  m.impl("unstructured_linear_grad_values", TORCH_BOX(&liveweight::unstructured_linear_grad_values));
}
#endif  // LW_BASE
