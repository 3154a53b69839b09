// grad_values[i] = sum over the batch of grad[:, row] x[:, column] for every kept weight i.
//
// A row of grad stays in registers and meets the rows of x at its columns; kLanes products are summed
// together (reduce_each.h). Groups belong to one thread each and panels come in order, so the result
// has equal bits for any thread count.
#include "reduce_each.h"
#include "unstructured_linear_grad.h"

namespace liveweight::LW_ISA {

template <int kParts>
LW_INLINE Vec multiply(const Vec (&g)[kParts], const float* row) {
  Vec sum = g[0] * load(row);
#pragma GCC unroll 16
  for (int part = 1; part < kParts; ++part) sum = fma(g[part], load(row + part * kLanes), sum);
  return sum;
}

template <int kWidth, class Index>
LW_INLINE void dots(const float* grad, const float* x, Group group, bool add, float* out) {
  const Index* columns = static_cast<const Index*>(group.columns);
  const Index* segments = static_cast<const Index*>(group.segments);
  for (int32_t s = 0; s < group.count; ++s) {
    const float* row = grad + int64_t(segments[2 * s]) * kWidth;
    if (s + 2 < group.count) {  // rows come in the order of their counts: not where hardware looks
      const float* later = grad + int64_t(segments[2 * s + 4]) * kWidth;
      for (int i = 0; i < kWidth; i += 16) prefetch(later + i);
    }
    const int entries = int(segments[2 * s + 1]) + 1;
    Vec g[kWidth / kLanes];
#pragma GCC unroll 16
    for (int part = 0; part < kWidth / kLanes; ++part) g[part] = load(row + part * kLanes);
    int i = 0;
    for (; i + kLanes / 4 < entries; i += kLanes) {
      const int some = entries - i < kLanes ? entries - i : kLanes;
      const int last = some - 1;
      const auto part = [&](int lane) __attribute__((always_inline)) {
        return multiply(g, x + int64_t(columns[i + (lane < last ? lane : last)]) * kWidth);
      };
      Vec sums;
      if (some == kLanes) {
        sums = reduce_each([&](int lane) __attribute__((always_inline)) {
          return multiply(g, x + int64_t(columns[i + lane]) * kWidth);
        });
        if (add) sums += load(out + i);
        store(out + i, sums);
      } else {
        sums = reduce_each(part);
        if (add) sums += load_first(out + i, some);
        store_first(out + i, sums, some);
      }
    }
    for (; i < entries; ++i) {
      const float sum = reduce_add(multiply(g, x + int64_t(columns[i]) * kWidth));
      out[i] = add ? out[i] + sum : sum;
    }
    columns += entries;
    out += entries;
  }
}

// out[i] (+)= dot of the rows of grad [rows, width] and x [tile, width] that entry i joins.
void grad_values_group(const float* grad, const float* x, int width, Group group, bool add, float* out) {
  if (group.wide) {
    if (width == 64) dots<64, uint16_t>(grad, x, group, add, out);
    else if (width == 32) dots<32, uint16_t>(grad, x, group, add, out);
    else dots<16, uint16_t>(grad, x, group, add, out);
  } else {
    if (width == 64) dots<64, uint8_t>(grad, x, group, add, out);
    else if (width == 32) dots<32, uint8_t>(grad, x, group, add, out);
    else dots<16, uint8_t>(grad, x, group, add, out);
  }
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {
namespace {

struct GradValues {
  Groups w;
  int64_t N, K;
  const float *grad, *x;  // [samples, N], [samples, K]
  float* out;             // [kept]

  void run(int64_t samples, bool add) const {
    const int64_t groups = w.count();
    const int64_t grain = grain_for(double(kept_entries(w.tiles)) * double(samples), groups);
    const int widest = widest_panel(w.tiles.columns);
    Panels rows(grad, N, w.padded_rows(), samples, widest, grain);
    Panels columns(x, K, w.padded_columns(), samples, widest, grain);
    parallel_for(groups, grain, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const Group group = w[g];
        const int64_t row = g / w.tiles.along * w.tiles.rows, column = g % w.tiles.along * w.tiles.columns;
        for (int64_t i = 0; i < rows.count(); ++i) {
          const int width = rows.width(i);
          LW_SELECT(grad_values_group)(rows.at(i) + row * width, columns.at(i) + column * width, width,
                                       group, add || i > 0, out + w.tiles.offsets[2 * g]);
        }
      }
    });
  }
};

Tensor grad_values(const Tensor& grad, const Tensor& x, const Tensor& columns, const Tensor& segments,
                   const Tensor& offsets, std::vector<int64_t> tile) {
  const char* op = "unstructured_linear_grad_values";
  GradValues job{};
  job.grad = checked_data<float>(op, "grad", grad, 2, ScalarType::Float);
  job.x = checked_data<float>(op, "x", x, 2, ScalarType::Float);
  const int64_t M = grad.size(0);
  LW_CHECK(x.size(0) == M, op, ": expected x [", M, ", ...], got ", shape_of(x));
  job.N = grad.size(1);
  job.K = x.size(1);
  const int64_t kept = columns.numel();
  Tensor out = torch::stable::new_empty(x, {kept});
  job.w = check_groups(op, out, columns, segments, offsets, tile, job.N, job.K);
  job.out = static_cast<float*>(out.mutable_data_ptr());
  if (M == 0) std::fill(job.out, job.out + kept, 0.0f);
  for (int64_t m = 0; m < M && kept > 0; m += kSamplesAtOnce) {
    const int64_t samples = std::min(kSamplesAtOnce, M - m);
    job.run(samples, m > 0);
    job.grad += samples * job.N;
    job.x += samples * job.K;
  }
  return out;
}

}  // namespace
}  // namespace liveweight

STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) {
  m.impl("unstructured_linear_grad_values", TORCH_BOX(&liveweight::grad_values));
}
#endif  // LW_BASE
