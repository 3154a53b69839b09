// y = act(x W^T + b) for W with whole blocks missing.
//
// Two kernels: for few samples rows of W lie in vectors and every number of x is a broadcast
// (block_linear_rows.h), for many samples it is the other way round (block_linear_panels.cpp). All groups
// of samples pass over a row of blocks before the next, so that weights come from memory once. The
// order of a sum never depends on threads. bf16 is widened where it is read and summed in fp32.
#include "block_linear_rows.h"

#ifdef LW_BASE
#include <algorithm>
#include <vector>
#endif

LW_DECLARE(void block_pack(const BlockInput& x, const BlockGroup& group, bool pair, int64_t begin,
                           int64_t end, float* out))
LW_DECLARE(int block_panel_width(int64_t left, int bh))
LW_DECLARE(void block_panel_row(const BlockWeight& w, const BlockGroup* groups, int count, int64_t n,
                                const BlockOutput& out, float* scratch))
LW_DECLARE(void block_rows(const BlockWeight& w, const BlockGroup* groups, int count, int64_t begin,
                           int64_t end, const BlockOutput& out, float* scratch))
LW_DECLARE(bool block_pairs(int bh, int bw))
LW_DECLARE(int block_group_width(int64_t left, int bh))

namespace liveweight::LW_ISA {

constexpr int kSizes[] = {16, 12, 8, 6, 4, 2, 1};

// Whether a vector holds two columns of a block.
bool block_pairs(int bh, int bw) { return bh * 2 == kLanes && bw % 2 == 0; }

LW_INLINE int vectors_of(int bh) { return bh % (2 * kLanes) == 0 ? 2 : 1; }

LW_INLINE constexpr bool fits(int samples, int vectors) {
  return samples * vectors <= kRegisters - 4;
}

// Samples of the next group: the largest size that is not more than one too wide.
int block_group_width(int64_t left, int bh) {
  for (int size : kSizes) {
    if (fits(size, vectors_of(bh)) && size <= left + (size > 2)) return size;
  }
  return 1;
}

typedef void (*StripKernel)(const BlockWeight&, int64_t, int64_t, const Strip&, int,
                            const BlockGroup&, const BlockOutput&);

template <class T, int kSamples, int kVectors>
StripKernel pick_kernel(bool pair, bool masked) {
  if constexpr (!fits(kSamples, kVectors)) {
    return nullptr;
  } else if constexpr (kVectors > 1) {
    return sum_strip<T, kSamples, kVectors, false, false>;
  } else {
    return pair     ? sum_strip<T, kSamples, 1, true, false>
           : masked ? sum_strip<T, kSamples, 1, false, true>
                    : sum_strip<T, kSamples, 1, false, false>;
  }
}

template <class T, int kVectors>
StripKernel pick_kernel(int samples, bool pair, bool masked) {
  switch (samples) {
    case 16: return pick_kernel<T, 16, kVectors>(pair, masked);
    case 12: return pick_kernel<T, 12, kVectors>(pair, masked);
    case 8: return pick_kernel<T, 8, kVectors>(pair, masked);
    case 6: return pick_kernel<T, 6, kVectors>(pair, masked);
    case 4: return pick_kernel<T, 4, kVectors>(pair, masked);
    case 2: return pick_kernel<T, 2, kVectors>(pair, masked);
    default: return pick_kernel<T, 1, kVectors>(pair, masked);
  }
}

// The groups of one row of blocks that have rows of W in vectors; `fetched`: the weights are near.
template <class T>
void sum_row(const BlockWeight& w, const BlockGroup* groups, int count, int64_t n, const BlockOutput& out,
             bool fetched) {
  const bool pair = block_pairs(w.bh, w.bw);
  const int vectors = vectors_of(w.bh);
  const int height = pair ? w.bh : vectors * kLanes;
  const int lines = int((w.size() * int64_t(sizeof(T)) + 63) / 64);
  const int left = int(w.N - n * w.bh < w.bh ? w.N - n * w.bh : w.bh);
  for (int skip = 0; skip < left; skip += height) {
    const int rows = w.bh - skip < height ? w.bh - skip : height;
    const Strip strip{n * w.bh + skip, skip, rows, left - skip < rows ? left - skip : rows};
    const bool masked = !pair && rows < height;
    for (int g = 0; g < count; ++g) {
      if (groups[g].panel) continue;
      const StripKernel run = vectors == 2 ? pick_kernel<T, 2>(groups[g].width, pair, masked)
                                           : pick_kernel<T, 1>(groups[g].width, pair, masked);
      run(w, w.offsets[n], w.offsets[n + 1], strip, fetched ? 0 : lines, groups[g], out);
      fetched = true;
    }
  }
}

void block_rows(const BlockWeight& w, const BlockGroup* groups, int count, int64_t begin, int64_t end,
                const BlockOutput& out, float* scratch) {
  int panels = 0;
  for (int g = 0; g < count; ++g) panels += groups[g].panel;
  for (int64_t n = begin; n < end; ++n) {
    if (panels > 0) block_panel_row(w, groups, count, n, out, scratch);
    if (panels == count) continue;
    if (w.bf16) sum_row<Bf16>(w, groups, count, n, out, panels > 0);
    else sum_row<float>(w, groups, count, n, out, panels > 0);
  }
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {
namespace {

constexpr int64_t kChunk = 256 * 1024;  // floats of packed samples that stay in the second-level cache
constexpr int kMostGroups = 64;

struct BlockJob {
  BlockInput x;
  BlockWeight w;
  BlockOutput out;

  // Samples that lie as a group wants them already.
  bool in_place(const BlockGroup& group, bool pair) const {
    if (w.padded_K() != w.K || x.bf16) return false;
    if (x.M == 1) return true;
    return x.batch_last && !pair && group.count == group.width && x.M % 16 == 0;
  }

  void run() const {
    if (x.M == 0 || w.N == 0) return;
    const bool pairs = LW_SELECT(block_pairs)(w.bh, w.bw);
    const int64_t K = w.padded_K(), most = std::clamp<int64_t>(kChunk / std::max<int64_t>(K, 1), 16, 256);
    const int64_t room = std::min<int64_t>(most, x.M + kMostBlockSamples) + kMostBlockSamples;
    Workspace<float> packed(room * K + 16);
    BlockGroup groups[kMostGroups];
    for (int64_t first = 0; first < x.M;) {
      int count = 0;
      int64_t lanes = 0;
      while (first < x.M && count < kMostGroups) {
        BlockGroup group{nullptr, 0, first, 0, 0, true};
        group.width = LW_SELECT(block_panel_width)(x.M - first, w.bh);
        if (group.width == 0) {
          group.panel = false;
          group.width = LW_SELECT(block_group_width)(x.M - first, w.bh);
        }
        group.count = int(std::min<int64_t>(group.width, x.M - first));
        if (count > 0 && lanes + group.width > most) break;
        group.x = packed.data() + lanes * K;
        group.step = group.width * (pairs && !group.panel ? 2 : 1);
        lanes += group.width;
        first += group.count;
        groups[count++] = group;
      }
      run_chunk(groups, count, lanes, pairs);
    }
  }

  void run_chunk(BlockGroup* groups, int count, int64_t lanes, bool pairs) const {
    const int64_t width = w.columns_of_blocks(), rows = w.rows();
    const int64_t threads = block_threads(double(w.offsets[rows]) * double(w.size() * lanes));
    const int64_t share = (width + threads - 1) / threads;
    parallel_for(width, std::max<int64_t>(share, 1), [&](int64_t begin, int64_t end) {
      for (int g = 0; g < count; ++g) {
        const bool pair = pairs && !groups[g].panel;
        if (in_place(groups[g], pair)) continue;
        LW_SELECT(block_pack)(x, groups[g], pair, begin * w.bw, end * w.bw,
                              const_cast<float*>(groups[g].x));
      }
    });
    for (int g = 0; g < count; ++g) {
      if (!in_place(groups[g], pairs && !groups[g].panel)) continue;
      groups[g].x = static_cast<const float*>(x.data) + groups[g].first;
      if (x.M > 1) groups[g].step = x.M;
    }
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      const int64_t from = share_blocks(w.offsets, rows, begin, threads);
      const int64_t to = share_blocks(w.offsets, rows, end, threads);
      Workspace<float> scratch(lanes * w.bh + block_piece_floats(w.size()));
      LW_SELECT(block_rows)(w, groups, count, from, to, out, scratch.data());
    });
  }
};

// x [M, K] contiguous or batch last; true where only the latter holds.
bool check_batch(const char* op, const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  LW_CHECK(x.is_cpu() && x.dim() == 2 && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16), op,
           ": expected x [M, K] float32 or bfloat16 on the CPU, got ",
           torch::headeronly::toString(dtype), " ", shape_of(x));
  if (x.is_contiguous()) return false;
  const bool last = (x.size(0) == 1 || x.stride(0) == 1) && (x.size(1) == 1 || x.stride(1) == x.size(0));
  LW_CHECK(last, op, ": expected x contiguous or batch last");
  return true;
}

Tensor new_output(const Tensor& x, int64_t M, int64_t N, bool batch_last) {
  if (!batch_last) return torch::stable::new_empty(x, {M, N});
  return torch::stable::transpose(torch::stable::new_empty(x, {N, M}), 0, 1);
}

Tensor block_linear(const Tensor& x, const Tensor& values, const Tensor& row_offsets,
                    const Tensor& columns, const Tensor& /*schedule*/, std::vector<int64_t> shape,
                    const std::optional<Tensor>& bias, int64_t activation, bool batch_last) {
  const char* op = "block_linear";
  BlockJob job{};
  job.x.batch_last = check_batch(op, x);
  LW_CHECK(shape.size() == 2, op, ": expected shape [N, K], got ", shape.size(), " sizes");
  job.w = check_block_weight(op, values, row_offsets, columns, shape[0], shape[1], x.scalar_type());
  LW_CHECK(x.size(1) == job.w.K, op, ": expected x [M, ", job.w.K, "], got ", shape_of(x));
  LW_CHECK(activation >= 0 && activation < kActivations, op, ": unknown activation ", activation);
  job.x.data = x.const_data_ptr();
  job.x.bf16 = x.scalar_type() == ScalarType::BFloat16;
  job.x.M = job.out.M = x.size(0);
  job.x.K = job.w.K;
  job.out.N = job.w.N;
  if (bias) {
    job.out.bias = checked_data<void>(op, "bias", *bias, 1, x.scalar_type());
    LW_CHECK(bias->numel() == job.w.N, op, ": expected bias [", job.w.N, "], got ", shape_of(*bias));
  }
  job.out.activation = int(activation);
  job.out.batch_last = batch_last;
  Tensor y = new_output(x, job.x.M, job.w.N, batch_last);
  job.out.y = y.mutable_data_ptr();
  job.run();
  return y;
}

}  // namespace
}  // namespace liveweight

STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) { m.impl("block_linear", TORCH_BOX(&liveweight::block_linear)); }
#endif  // LW_BASE
