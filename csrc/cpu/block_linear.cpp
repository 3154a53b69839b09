// y = act(x W^T + b) for W with whole blocks missing.
//
// Up to 16 samples at a time are packed side by side; rows of W lie in vectors and every number of x
// is a broadcast (block_linear_rows.h). All groups of samples pass over a row of blocks before the
// next, so that weights come from memory once. The order of a sum never depends on threads.
#include "block_linear_rows.h"

#include "layout.h"

#ifdef LW_BASE
#include <vector>
#endif

LW_DECLARE(void block_pack(const float* x, int64_t M, int64_t K, bool batch_last, BlockGroup group,
                           bool pair, int64_t begin, int64_t end, float* out))
LW_DECLARE(void block_rows(BlockWeight w, const BlockGroup* groups, int count, int64_t begin,
                           int64_t end, BlockOutput out))
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

// Columns [begin, end) of the padded K of a group; both are even for pairs.
void block_pack(const float* x, int64_t M, int64_t K, bool batch_last, BlockGroup group, bool pair,
                int64_t begin, int64_t end, float* out) {
  const int64_t last = end < K ? end : K;
  const int width = group.width;
  if (begin < last && (pair || batch_last)) {
    const int64_t unit = pair ? 2 : 1;
    const int64_t per_sample = batch_last ? 1 : K, per_column = batch_last ? M : 1;
    const float* from = x + group.first * per_sample;
    constexpr int64_t kPart = 16;
    for (int64_t k0 = begin; k0 < last; k0 += kPart) {
      const int64_t k1 = k0 + kPart < last ? k0 + kPart : last;
      for (int s = 0; s < group.count; ++s) {
        for (int64_t k = k0; k < k1; ++k) {
          out[(k / unit * width + s) * unit + k % unit] = from[s * per_sample + k * per_column];
        }
      }
    }
  } else if (begin < last) {
    transpose_rows(x + group.first * K + begin, K, out + begin * width, width, group.count, last - begin);
  }
  const int64_t unit = pair ? 2 : 1;
  for (int64_t k = begin; k < end; ++k) {
    for (int s = k < K ? group.count : 0; s < width; ++s) {
      out[(k / unit * width + s) * unit + k % unit] = 0.0f;
    }
  }
}

typedef void (*StripKernel)(const BlockWeight&, int64_t, int64_t, const Strip&, const Fetch&,
                            const BlockGroup&, const BlockOutput&);

template <int kSamples, int kVectors>
StripKernel pick_kernel(bool pair, bool masked) {
  if constexpr (!fits(kSamples, kVectors)) {
    return nullptr;
  } else if constexpr (kVectors > 1) {
    return sum_strip<kSamples, kVectors, false, false>;
  } else {
    return pair     ? sum_strip<kSamples, 1, true, false>
           : masked ? sum_strip<kSamples, 1, false, true>
                    : sum_strip<kSamples, 1, false, false>;
  }
}

template <int kVectors>
StripKernel pick_kernel(int samples, bool pair, bool masked) {
  switch (samples) {
    case 16: return pick_kernel<16, kVectors>(pair, masked);
    case 12: return pick_kernel<12, kVectors>(pair, masked);
    case 8: return pick_kernel<8, kVectors>(pair, masked);
    case 6: return pick_kernel<6, kVectors>(pair, masked);
    case 4: return pick_kernel<4, kVectors>(pair, masked);
    case 2: return pick_kernel<2, kVectors>(pair, masked);
    default: return pick_kernel<1, kVectors>(pair, masked);
  }
}

void block_rows(BlockWeight w, const BlockGroup* groups, int count, int64_t begin, int64_t end,
                BlockOutput out) {
  const bool pair = block_pairs(w.bh, w.bw);
  const int vectors = vectors_of(w.bh);
  const int height = pair ? w.bh : vectors * kLanes;
  const int strips = (w.bh + height - 1) / height, lines = int((w.size() + 15) / 16);
  const int passes = strips * count;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t at = w.offsets[n], stop = w.offsets[n + 1];
    const int left = int(w.N - n * w.bh < w.bh ? w.N - n * w.bh : w.bh);
    int pass = 0;
    for (int skip = 0; skip < w.bh; skip += height) {
      const int rows = w.bh - skip < height ? w.bh - skip : height;
      const Strip strip{n * w.bh + skip, skip, rows, left - skip < rows ? left - skip : rows};
      for (int g = 0; g < count; ++g, ++pass) {
        const Fetch fetch{(stop - at) * w.size() - skip, lines * pass / passes, lines * (pass + 1) / passes};
        const bool masked = !pair && rows < height;
        const StripKernel run = vectors == 2 ? pick_kernel<2>(groups[g].width, pair, masked)
                                             : pick_kernel<1>(groups[g].width, pair, masked);
        if (strip.count > 0) run(w, at, stop, strip, fetch, groups[g], out);
      }
    }
  }
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {
namespace {

constexpr int64_t kChunk = 256 * 1024;  // floats of packed samples that stay in the second-level cache

struct BlockJob {
  const float* x;
  int64_t M;
  bool x_batch_last;
  BlockWeight w;
  BlockOutput out;

  // Samples that lie as a group wants them already.
  bool in_place(const BlockGroup& group, bool pair) const {
    if (w.padded_K() != w.K) return false;
    if (M == 1) return true;
    return x_batch_last && !pair && group.count == group.width;
  }

  void run() const {
    if (M == 0 || w.N == 0) return;
    const bool pair = LW_SELECT(block_pairs)(w.bh, w.bw);
    const int64_t K = w.padded_K(), most = std::max<int64_t>(kChunk / std::max<int64_t>(K, 1), 16);
    const int64_t room = std::min<int64_t>(most, M + 1) + 1;
    Workspace<float> packed(room * K + 16);
    BlockGroup groups[256];
    for (int64_t first = 0; first < M;) {
      int count = 0;
      int64_t lanes = 0;
      while (first < M && count < 256) {
        BlockGroup group{nullptr, 0, first, 0, 0};
        group.width = LW_SELECT(block_group_width)(M - first, w.bh);
        group.count = int(std::min<int64_t>(group.width, M - first));
        if (count > 0 && lanes + group.width > most) break;
        group.x = packed.data() + lanes * K;
        group.step = group.width * (pair ? 2 : 1);
        lanes += group.width;
        first += group.count;
        groups[count++] = group;
      }
      run_chunk(groups, count, lanes, pair);
    }
  }

  void run_chunk(BlockGroup* groups, int count, int64_t lanes, bool pair) const {
    const int64_t width = w.columns_of_blocks(), rows = w.rows();
    const int64_t threads = block_threads(double(w.offsets[rows]) * double(w.size() * lanes));
    const int64_t share = (width + threads - 1) / threads;
    parallel_for(width, std::max<int64_t>(share, 1), [&](int64_t begin, int64_t end) {
      begin *= w.bw;
      end *= w.bw;
      for (int g = 0; g < count; ++g) {
        if (in_place(groups[g], pair)) continue;
        LW_SELECT(block_pack)(x, M, w.K, x_batch_last, groups[g], pair, begin, end,
                              const_cast<float*>(groups[g].x));
      }
    });
    for (int g = 0; g < count; ++g) {
      if (!in_place(groups[g], pair)) continue;
      groups[g].x = x + groups[g].first;
      if (M > 1) groups[g].step = M;
    }
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      const int64_t from = share_blocks(w.offsets, rows, begin, threads);
      const int64_t to = share_blocks(w.offsets, rows, end, threads);
      LW_SELECT(block_rows)(w, groups, count, from, to, out);
    });
  }
};

// x [M, K] contiguous or batch last; true where only the latter holds.
bool check_batch(const char* op, const Tensor& x) {
  LW_CHECK(x.is_cpu() && x.dim() == 2 && x.scalar_type() == ScalarType::Float, op,
           ": expected x [M, K] float32 on the CPU, got ",
           torch::headeronly::toString(x.scalar_type()), " ", shape_of(x));
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
                    const Tensor& columns, std::vector<int64_t> shape,
                    const std::optional<Tensor>& bias, int64_t activation, bool batch_last) {
  const char* op = "block_linear";
  BlockJob job{};
  job.x_batch_last = check_batch(op, x);
  LW_CHECK(shape.size() == 2, op, ": expected shape [N, K], got ", shape.size(), " sizes");
  job.w = check_block_weight(op, values, row_offsets, columns, shape[0], shape[1]);
  LW_CHECK(x.size(1) == job.w.K, op, ": expected x [M, ", job.w.K, "], got ", shape_of(x));
  LW_CHECK(activation >= 0 && activation < kActivations, op, ": unknown activation ", activation);
  job.x = static_cast<const float*>(x.const_data_ptr());
  job.M = x.size(0);
  job.out.M = job.M;
  job.out.N = job.w.N;
  if (bias) {
    job.out.bias = checked_data<float>(op, "bias", *bias, 1, ScalarType::Float);
    LW_CHECK(bias->numel() == job.w.N, op, ": expected bias [", job.w.N, "], got ", shape_of(*bias));
  }
  job.out.activation = int(activation);
  job.out.batch_last = batch_last;
  Tensor y = new_output(x, job.M, job.w.N, batch_last);
  job.out.y = static_cast<float*>(y.mutable_data_ptr());
  job.run();
  return y;
}

}  // namespace
}  // namespace liveweight

STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) { m.impl("block_linear", TORCH_BOX(&liveweight::block_linear)); }
#endif  // LW_BASE
