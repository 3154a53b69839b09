// Samples of block_linear as its kernels read them: packed side by side, widened to fp32.
#include "block_linear.h"
#include "layout.h"

LW_DECLARE(void block_pack(const BlockInput& x, const BlockGroup& group, bool pair, int64_t begin,
                           int64_t end, float* out))

namespace liveweight::LW_ISA {

// out[k / 2][s][k % 2] for columns [begin, end) of x, which are even.
template <class T>
void pack_pairs(const T* x, int64_t per_sample, int64_t per_column, const BlockGroup& group, int64_t begin,
                int64_t end, float* out) {
  constexpr int64_t kPart = 16;
  for (int64_t k0 = begin; k0 < end; k0 += kPart) {
    const int64_t k1 = k0 + kPart < end ? k0 + kPart : end;
    for (int s = 0; s < group.count; ++s) {
      for (int64_t k = k0; k < k1; ++k) {
        out[(k / 2 * group.width + s) * 2 + k % 2] = to_float(x[s * per_sample + k * per_column]);
      }
    }
  }
}

// out[k][s] for samples that lie side by side, `step` numbers from column to column.
template <class T>
void pack_columns(const T* x, int64_t step, const BlockGroup& group, int64_t begin, int64_t end,
                  float* out) {
  for (int64_t k = begin; k < end; ++k) {
    const T* from = x + k * step;
    float* to = out + k * group.width;
    int s = 0;
    for (; s + kLanes <= group.count; s += kLanes) store(to + s, load(from + s));
    for (; s < group.count; ++s) to[s] = to_float(from[s]);
  }
}

void pack_rows(const float* x, int64_t step, const BlockGroup& group, int64_t begin, int64_t end,
               float* out) {
  transpose_rows(x + begin, step, out + begin * group.width, group.width, group.count, end - begin);
}

void pack_rows(const Bf16* x, int64_t step, const BlockGroup& group, int64_t begin, int64_t end,
               float* out) {
  constexpr int kPart = 64;
  float wide[kMostBlockSamples * kPart];
  for (int64_t k0 = begin; k0 < end; k0 += kPart) {
    const int part = int(end - k0 < kPart ? end - k0 : kPart);
    for (int s = 0; s < group.count; ++s) {
      const Bf16* from = x + s * step + k0;
      int k = 0;
      for (; k + kLanes <= part; k += kLanes) store(wide + s * kPart + k, load(from + k));
      for (; k < part; ++k) wide[s * kPart + k] = to_float(from[k]);
    }
    transpose_rows(wide, kPart, out + k0 * group.width, group.width, group.count, part);
  }
}

template <class T>
void pack(const BlockInput& x, const BlockGroup& group, bool pair, int64_t begin, int64_t end, float* out) {
  const int64_t last = end < x.K ? end : x.K;
  const T* from = static_cast<const T*>(x.data) + group.first * (x.batch_last ? 1 : x.K);
  if (begin < last) {
    if (pair) pack_pairs(from, x.batch_last ? 1 : x.K, x.batch_last ? x.M : 1, group, begin, last, out);
    else if (x.batch_last) pack_columns(from, x.M, group, begin, last, out);
    else pack_rows(from, x.K, group, begin, last, out);
  }
  const int64_t unit = pair ? 2 : 1;
  if (group.count == group.width && end <= x.K) return;
  for (int64_t k = begin; k < end; ++k) {
    for (int s = k < x.K ? group.count : 0; s < group.width; ++s) {
      out[(k / unit * group.width + s) * unit + k % unit] = 0.0f;
    }
  }
}

// Columns [begin, end) of the padded K of a group; both are even for pairs.
void block_pack(const BlockInput& x, const BlockGroup& group, bool pair, int64_t begin, int64_t end,
                float* out) {
  if (x.bf16) pack<Bf16>(x, group, pair, begin, end, out);
  else pack<float>(x, group, pair, begin, end, out);
}

}  // namespace liveweight::LW_ISA
