// y = act(x W^T + b) for W in compressed sparse rows.
//
// Batches are turned into panels (panels.h), so that one kept weight is one broadcast and a few
// multiply-adds. A panel beyond the second-level cache is cut into tiles of columns: all rows of a
// block use one tile before they go on to the next. A single sample has no lanes to share: there the
// input is gathered. The order of a sum never depends on threads.
#include "unstructured_linear.h"

namespace liveweight::LW_ISA {

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

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {
namespace {

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

}  // namespace
}  // namespace liveweight

STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) {
  m.impl("unstructured_linear", TORCH_BOX(&liveweight::unstructured_linear));
}
#endif  // LW_BASE
