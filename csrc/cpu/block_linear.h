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
  const int32_t* offsets;  // [rows of blocks + 1]
  const int32_t* columns;  // [kept]
  int64_t N, K;
  int bh, bw;

  int64_t rows() const { return (N + bh - 1) / bh; }
  int64_t columns_of_blocks() const { return (K + bw - 1) / bw; }
  int64_t padded_K() const { return columns_of_blocks() * bw; }
  int64_t size() const { return int64_t(bh) * bw; }
};

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
                                      const Tensor& columns, int64_t N, int64_t K) {
  const float* data = checked_data<float>(op, "values", values, 3, ScalarType::Float);
  BlockWeight w = check_blocks(op, offsets, columns, N, K, values.size(2), values.size(1));
  LW_CHECK(values.size(0) == columns.numel(), op, ": expected ", columns.numel(), " blocks, got ",
           values.size(0));
  w.values = data;
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
