// grad_x = grad W for a tiled pattern, in scatter form: no transposed copy of the weight.
//
// A row of grad (one output, up to 64 samples) stays in registers; every kept weight of the row adds
// its multiple to the row of sums of its column. The sums of a tile of columns stay in the first
// caches and belong to one thread, and rows come in their order: equal bits for any thread count.
#include "unstructured_linear_grad.h"

namespace liveweight::LW_ISA {

void grad_fill(const float* from, int64_t columns, int samples, int width, float* panel) {
  fill_panel(from, columns, samples, width, 0, columns, panel);
}

template <int kWidth, class Index>
LW_INLINE void scatter(const float* grad, Group group, float* sums) {
  constexpr int kParts = kWidth / kLanes;
  const Index* columns = static_cast<const Index*>(group.columns);
  const Index* segments = static_cast<const Index*>(group.segments);
  const float* values = group.values;
  for (int32_t s = 0; s < group.count; ++s) {
    const float* row = grad + int64_t(segments[2 * s]) * kWidth;
    if (s + 2 < group.count) {  // rows come in the order of their counts: not where hardware looks
      const float* later = grad + int64_t(segments[2 * s + 4]) * kWidth;
      for (int i = 0; i < kWidth; i += 16) prefetch(later + i);
    }
    const int entries = int(segments[2 * s + 1]) + 1;
    Vec g[kParts];
#pragma GCC unroll 16
    for (int part = 0; part < kParts; ++part) g[part] = load(row + part * kLanes);
    for (int i = 0; i < entries; ++i) {
      float* sum = sums + int64_t(columns[i]) * kWidth;
      const Vec value = broadcast(values[i]);
#pragma GCC unroll 16
      for (int part = 0; part < kParts; ++part) {
        store(sum + part * kLanes, fma(value, g[part], load(sum + part * kLanes)));
      }
    }
    columns += entries;
    values += entries;
  }
}

// sums [tile, width] += the group's part of W^T grad, grad [rows, width].
void grad_x_group(const float* grad, int width, Group group, float* sums) {
  if (group.wide) {
    if (width == 64) scatter<64, uint16_t>(grad, group, sums);
    else if (width == 32) scatter<32, uint16_t>(grad, group, sums);
    else scatter<16, uint16_t>(grad, group, sums);
  } else {
    if (width == 64) scatter<64, uint8_t>(grad, group, sums);
    else if (width == 32) scatter<32, uint8_t>(grad, group, sums);
    else scatter<16, uint8_t>(grad, group, sums);
  }
}

// out[m * stride + k] = sums[k, m] for the first samples m and columns k.
void grad_x_store(const float* sums, int width, int samples, int64_t columns, float* out,
                  int64_t stride) {
  for (int m = 0; m < samples; m += 4) {
    const int some = samples - m < 4 ? samples - m : 4;
    for (int64_t k = 0; k < columns; k += 4) {
      const int64_t few = columns - k < 4 ? columns - k : 4;
      Lanes<4> v[4] = {};
      for (int64_t i = 0; i < few; ++i) v[i] = load_lanes<4>(sums + (k + i) * width + m);
      transpose4(v);
      for (int i = 0; i < some; ++i) {
        __builtin_memcpy(out + (m + i) * stride + k, &v[i], size_t(few) * sizeof(float));
      }
    }
  }
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {
namespace {

struct GradX {
  Groups w;
  int64_t N, K;
  const float* grad;  // [samples, N]
  float* out;         // [samples, K]

  // One tile of columns: all groups below each other, each with all panels while it is near.
  void run_tile(Panels& panels, int64_t tile, float* sums) const {
    const int64_t size = w.padded_tile();
    std::fill(sums, sums + size * panels.lanes(), 0.0f);
    for (int64_t block = 0; block < w.tiles.blocks; ++block) {
      const Group group = w[block * w.tiles.along + tile];
      float* part = sums;
      for (int64_t i = 0; i < panels.count(); ++i) {
        const int width = panels.width(i);
        LW_SELECT(grad_x_group)(panels.at(i) + block * w.tiles.rows * width, width, group, part);
        part += size * width;
      }
    }
    const int64_t first = tile * w.tiles.columns;
    int64_t sample = 0;
    for (int64_t i = 0; i < panels.count(); ++i) {
      LW_SELECT(grad_x_store)(sums, panels.width(i), panels.filled(i),
                              std::min(w.tiles.columns, K - first), out + sample * K + first, K);
      sums += size * panels.width(i);
      sample += panels.filled(i);
    }
  }

  void run(int64_t samples) const {
    const int64_t grain = grain_for(double(kept_entries(w.tiles)) * double(samples), w.tiles.along);
    Panels panels(grad, N, w.padded_rows(), samples, widest_panel(w.tiles.columns), grain);
    parallel_for(w.tiles.along, grain, [&](int64_t begin, int64_t end) {
      Workspace<float> sums(w.padded_tile() * panels.lanes());
      for (int64_t tile = begin; tile < end; ++tile) run_tile(panels, tile, sums.data());
    });
  }
};

Tensor grad_x(const Tensor& grad, const Tensor& values, const Tensor& columns, const Tensor& segments,
              const Tensor& offsets, std::vector<int64_t> tile, int64_t in_features) {
  const char* op = "unstructured_linear_grad_x";
  GradX job{};
  job.grad = checked_data<float>(op, "grad", grad, 2, ScalarType::Float);
  const int64_t M = grad.size(0);
  job.N = grad.size(1);
  job.K = in_features;
  LW_CHECK(job.K >= 0, op, ": expected in_features >= 0, got ", job.K);
  job.w = check_groups(op, values, columns, segments, offsets, tile, job.N, job.K);
  Tensor out = torch::stable::new_empty(grad, {M, job.K});
  job.out = static_cast<float*>(out.mutable_data_ptr());
  for (int64_t m = 0; m < M && job.K > 0; m += kSamplesAtOnce) {
    const int64_t samples = std::min(kSamplesAtOnce, M - m);
    job.run(samples);
    job.grad += samples * job.N;
    job.out += samples * job.K;
  }
  return out;
}

}  // namespace
}  // namespace liveweight

STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) {
  m.impl("unstructured_linear_grad_x", TORCH_BOX(&liveweight::grad_x));
}
#endif  // LW_BASE
