// What block_linear and its gradients share: the pattern of kept blocks, its checks, its shares.
//
// W [N, K] is cut into blocks of bh x bw; what sticks out of W is padded with zeros. A kept block is
// stored as [bw, bh]: a column of W is a run of bh values, so that rows lie side by side in a vector.
#pragma once

#include "dispatch.h"
#include "lanes.h"

namespace liveweight {

struct BlockWeight {
  const float* values;     // [kept, bw, bh]
  const Bf16* halves;      // the same where bf16
  bool bf16;               // not to be read from the pointers: both are null where nothing is kept
  const int32_t* offsets;  // [rows of blocks + 1]
  const int32_t* columns;  // [kept]
  int64_t N, K;
  int bh, bw;

  int64_t rows() const { return (N + bh - 1) / bh; }
  int64_t columns_of_blocks() const { return (K + bw - 1) / bw; }
  int64_t padded_K() const { return columns_of_blocks() * bw; }
  int64_t size() const { return int64_t(bh) * bw; }
};

template <class T>
const T* block_values(const BlockWeight& w) {
  if constexpr (sizeof(T) == sizeof(float)) return w.values;
  else return w.halves;
}

struct BlockInput {
  const void* data;  // float or Bf16
  int64_t M, K;
  bool bf16, batch_last;  // x[k * M + m], else x[m * K + k]
};

// Some samples of x, packed as [padded K / g][width][g], g = 2 for pairs, else 1.
struct BlockGroup {
  const float* x;
  int64_t step;   // floats from one step of columns to the next
  int64_t first;  // first sample
  int count;      // samples
  int width;      // count rounded up to a size that kernels have; lanes without a sample are 0
  bool panel;     // samples lie in vectors, else rows of W do
};

struct BlockOutput {
  void* y;  // float or Bf16, as is the bias
  int64_t M, N;
  const void* bias;
  int activation;
  bool batch_last;  // y[n * M + m], else y[m * N + n]
};

constexpr int kMostBlockSamples = 48;  // of one group
constexpr int64_t kPiece = 4096;       // weights that stay in the first-level cache beside samples

// Scratch in which a piece is widened to fp32.
inline int64_t block_piece_floats(int64_t size) { return size < kPiece ? kPiece : size; }

}  // namespace liveweight

#ifdef LW_BASE
#include <algorithm>

namespace liveweight {

// Threads worth waking for so many multiply-adds.
inline int64_t block_threads(double work) {
  return work < 4e5 ? 1 : int64_t(torch::stable::get_num_threads());
}

// Guards memory at the cost of one look per row of blocks: columns rise inside a row (the format
// checks that once), so the first and the last of a row bound the others.
inline BlockWeight check_blocks(const char* op, const Tensor& offsets, const Tensor& columns, int64_t N,
                                int64_t K, int64_t bh, int64_t bw) {
  constexpr int64_t kMost = 128;
  LW_CHECK(N >= 0 && K >= 0, op, ": expected shape >= 0, got [", N, ", ", K, "]");
  LW_CHECK(bh >= 1 && bw >= 1 && bh <= kMost && bw <= kMost, op, ": expected blocks of 1 to ", kMost,
           " rows and columns, got ", bh, " x ", bw);
  BlockWeight w{};
  w.offsets = checked_data<int32_t>(op, "row_offsets", offsets, 1, ScalarType::Int);
  w.columns = checked_data<int32_t>(op, "columns", columns, 1, ScalarType::Int);
  w.N = N;
  w.K = K;
  w.bh = int(bh);
  w.bw = int(bw);
  const int64_t rows = w.rows(), kept = columns.numel();
  LW_CHECK(offsets.numel() == rows + 1, op, ": expected ", rows + 1, " row_offsets, got ",
           offsets.numel());
  bool ordered = w.offsets[0] == 0 && w.offsets[rows] == kept;
  for (int64_t n = 0; n < rows; ++n) ordered &= w.offsets[n] <= w.offsets[n + 1];
  LW_CHECK(ordered, op, ": row_offsets must rise from 0 to ", kept);
  const int64_t width = w.columns_of_blocks();
  bool inside = true;
  for (int64_t n = 0; n < rows; ++n) {
    if (w.offsets[n] == w.offsets[n + 1]) continue;
    inside &= w.columns[w.offsets[n]] >= 0 && w.columns[w.offsets[n + 1] - 1] < width;
  }
  LW_CHECK(inside, op, ": columns must be in [0, ", width, ")");
  return w;
}

inline BlockWeight check_block_weight(const char* op, const Tensor& values, const Tensor& offsets,
                                      const Tensor& columns, int64_t N, int64_t K,
                                      ScalarType dtype = ScalarType::Float) {
  const void* data = checked_data<void>(op, "values", values, 3, dtype);
  BlockWeight w = check_blocks(op, offsets, columns, N, K, values.size(2), values.size(1));
  LW_CHECK(values.size(0) == columns.numel(), op, ": expected ", columns.numel(), " blocks, got ",
           values.size(0));
  w.bf16 = dtype == ScalarType::BFloat16;
  if (!w.bf16) w.values = static_cast<const float*>(data);
  else w.halves = static_cast<const Bf16*>(data);
  return w;
}

// List at which part `part` of `parts` begins when blocks are shared evenly.
inline int64_t share_blocks(const int32_t* offsets, int64_t lists, int64_t part, int64_t parts) {
  if (part == parts) return lists;
  const double wanted = (double(offsets[lists]) + double(lists)) * double(part) / double(parts);
  int64_t low = 0, high = lists;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (double(offsets[middle]) + double(middle) < wanted) low = middle + 1;
    else high = middle;
  }
  return low;
}

}  // namespace liveweight
#endif  // LW_BASE
