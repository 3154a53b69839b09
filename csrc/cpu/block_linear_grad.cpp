// Gradients of block_linear at sparse cost, from the same values.
//
// To x: samples in vectors, weights as broadcasts, one list of kept blocks for each column of blocks.
// To the values: rows of W in vectors, samples one after another. Each number has one owner, whose
// order of adding is fixed.
#include "block_linear.h"
#include "layout.h"

namespace liveweight {

// Kept blocks of every column of blocks, rows rising: where each is stored and its row of blocks.
struct BlockColumns {
  const int32_t *offsets, *blocks, *rows;
};

}  // namespace liveweight

LW_DECLARE(int64_t block_panel_width())
LW_DECLARE(void block_turn(const float* from, int64_t step, int64_t count, int64_t begin, int64_t end,
                           int64_t limit, float* panel))
LW_DECLARE(void block_grad_x(const float* panel, int count, BlockWeight w, BlockColumns list,
                             int64_t begin, int64_t end, float* out))
LW_DECLARE(void block_split(const float* from, int64_t step, int64_t count, int64_t length, int size,
                            int64_t begin, int64_t end, float* out))
LW_DECLARE(void block_grad_values(const float* grad, const float* x, int64_t count, BlockWeight w,
                                  int64_t begin, int64_t end, bool add, float* out))

namespace liveweight::LW_ISA {

constexpr int kParts = 2;  // vectors of samples
constexpr int kPanel = kParts * kLanes;
typedef Lanes<kLanes> Row;

int64_t block_panel_width() { return kPanel; }

// panel[n][m] = from[m * step + n] for n in [begin, end), 0 beyond `count` samples and `limit` numbers.
void block_turn(const float* from, int64_t step, int64_t count, int64_t begin, int64_t end,
                int64_t limit, float* panel) {
  const int64_t last = end < limit ? end : limit;
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t m = n < limit ? count : 0; m < kPanel; ++m) panel[n * kPanel + m] = 0.0f;
  }
  if (begin < last) transpose_rows(from + begin, step, panel + begin * kPanel, kPanel, count, last - begin);
}

// kColumns columns of W from `column` of their block on, through all blocks of the list.
template <int kColumns>
LW_INLINE void add_columns(const float* panel, const BlockWeight& w, const BlockColumns& list,
                           int64_t block_column, int column, float* sums) {
  Row acc[kColumns][kParts] = {};
  for (int32_t at = list.offsets[block_column]; at < list.offsets[block_column + 1]; ++at) {
    const float* weight = w.values + list.blocks[at] * w.size() + int64_t(column) * w.bh;
    const float* row = panel + int64_t(list.rows[at]) * w.bh * kPanel;
    for (int r = 0; r < w.bh; ++r, row += kPanel) {
      const Row low = load_lanes<kLanes>(row), high = load_lanes<kLanes>(row + kLanes);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        const Row value = weight[c * w.bh + r] - Row{};
        acc[c][0] += value * low;
        acc[c][1] += value * high;
      }
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < kColumns; ++c) {
    store_lanes<kLanes>(sums + c * kPanel, acc[c][0]);
    store_lanes<kLanes>(sums + c * kPanel + kLanes, acc[c][1]);
  }
}

void block_grad_x(const float* panel, int count, BlockWeight w, BlockColumns list, int64_t begin,
                  int64_t end, float* out) {
  constexpr int kMost = kLanes == 16 ? 8 : 4;
  float sums[kMost * kPanel];
  for (int64_t k = begin; k < end; ++k) {
    for (int column = 0; column < w.bw;) {
      const int left = w.bw - column;
      const int some = left >= kMost ? kMost : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      if (some == kMost) add_columns<kMost>(panel, w, list, k, column, sums);
      else if (some == 4) add_columns<4>(panel, w, list, k, column, sums);
      else if (some == 2) add_columns<2>(panel, w, list, k, column, sums);
      else add_columns<1>(panel, w, list, k, column, sums);
      const int64_t first = k * w.bw + column, inside = w.K - first;
      if (inside > 0) {
        transpose_rows(sums, kPanel, out + first, w.K, inside < some ? inside : some, count);
      }
      column += some;
    }
  }
}

// out[b][m][0 .. size) = from[m * step + b * size ...] for strips b in [begin, end), 0 beyond length.
void block_split(const float* from, int64_t step, int64_t count, int64_t length, int size, int64_t begin,
                 int64_t end, float* out) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t left = length - b * size;
    const int inside = int(left < size ? left : size);
    for (int64_t m = 0; m < count; ++m) {
      float* to = out + (b * count + m) * size;
      __builtin_memcpy(to, from + m * step + b * size, size_t(inside) * sizeof(float));
      for (int i = inside; i < size; ++i) to[i] = 0.0f;
    }
  }
}

// out[c][0 .. rows) (+)= sum over m of grad[m][...] * x[m][c]; chains hide the latency of an FMA.
template <int kColumns>
LW_INLINE void add_products(const float* grad, const float* x, int64_t count, const BlockWeight& w,
                            int rows, bool add, float* out) {
  constexpr int kChains = kColumns >= 8 ? 1 : 8 / kColumns;
  Row acc[kChains][kColumns] = {};
  int64_t m = 0;
  for (; m + kChains <= count; m += kChains) {
#pragma GCC unroll 8
    for (int chain = 0; chain < kChains; ++chain) {
      const Row g = load_first(grad + (m + chain) * w.bh, rows).v;
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) acc[chain][c] += g * x[(m + chain) * w.bw + c];
    }
  }
  for (; m < count; ++m) {
    const Row g = load_first(grad + m * w.bh, rows).v;
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) acc[0][c] += g * x[m * w.bw + c];
  }
#pragma GCC unroll 16
  for (int c = 0; c < kColumns; ++c) {
    Row sum = acc[0][c];
#pragma GCC unroll 8
    for (int chain = 1; chain < kChains; ++chain) sum += acc[chain][c];
    if (add) sum += Row(load_first(out + c * w.bh, rows).v);
    store_first(out + c * w.bh, Vec{sum}, rows);
  }
}

void block_grad_values(const float* grad, const float* x, int64_t count, BlockWeight w, int64_t begin,
                       int64_t end, bool add, float* out) {
  constexpr int kMost = kLanes == 16 ? 16 : 8;
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t i = w.offsets[n]; i < w.offsets[n + 1]; ++i) {
      for (int r = 0; r < w.bh; r += kLanes) {
        const int rows = w.bh - r < kLanes ? w.bh - r : kLanes;
        const float* g = grad + n * count * w.bh + r;
        for (int c = 0; c < w.bw;) {
          const int left = w.bw - c;
          const float* from = x + int64_t(w.columns[i]) * count * w.bw + c;
          float* to = out + i * w.size() + int64_t(c) * w.bh + r;
          const int some = left >= kMost ? kMost : left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
          if (some == kMost) add_products<kMost>(g, from, count, w, rows, add, to);
          else if (some == 8) add_products<8>(g, from, count, w, rows, add, to);
          else if (some == 4) add_products<4>(g, from, count, w, rows, add, to);
          else if (some == 2) add_products<2>(g, from, count, w, rows, add, to);
          else add_products<1>(g, from, count, w, rows, add, to);
          c += some;
        }
      }
    }
  }
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
#include <vector>

namespace liveweight {
namespace {

// The list of kept blocks by columns, by counting: blocks of a column keep the order of rows.
struct TurnedBlocks {
  Workspace<int32_t> offsets, blocks, rows;

  explicit TurnedBlocks(const BlockWeight& w)
      : offsets(w.columns_of_blocks() + 2),
        blocks(w.offsets[w.rows()] + 1),
        rows(w.offsets[w.rows()] + 1) {
    const int64_t width = w.columns_of_blocks(), kept = w.offsets[w.rows()];
    std::fill(offsets.data(), offsets.data() + width + 2, 0);
    for (int64_t i = 0; i < kept; ++i) {
      const int32_t column = w.columns[i];
      LW_CHECK(column >= 0 && column < width, "columns must be in [0, ", width, "), got ", column);
      ++offsets[column + 2];
    }
    for (int64_t k = 2; k <= width; ++k) offsets[k] += offsets[k - 1];
    for (int64_t n = 0; n < w.rows(); ++n) {
      for (int32_t i = w.offsets[n]; i < w.offsets[n + 1]; ++i) {
        const int32_t at = offsets[w.columns[i] + 1]++;
        blocks[at] = i;
        rows[at] = int32_t(n);
      }
    }
  }
};

// Runs body(begin, end) over shares of [0, count).
template <class Body>
void share_evenly(int64_t count, int64_t threads, const Body& body) {
  parallel_for(count, std::max<int64_t>((count + threads - 1) / threads, 1), body);
}

Tensor block_linear_grad_x(const Tensor& grad, const Tensor& values, const Tensor& row_offsets,
                           const Tensor& columns, const Tensor& /*schedule*/,
                           std::vector<int64_t> shape) {
  const char* op = "block_linear_grad_x";
  const float* g = checked_data<float>(op, "grad", grad, 2, ScalarType::Float);
  LW_CHECK(shape.size() == 2, op, ": expected shape [N, K], got ", shape.size(), " sizes");
  const BlockWeight w = check_block_weight(op, values, row_offsets, columns, shape[0], shape[1]);
  LW_CHECK(grad.size(1) == w.N, op, ": expected grad [M, ", w.N, "], got ", shape_of(grad));
  const int64_t M = grad.size(0), wide = LW_SELECT(block_panel_width)(), height = w.rows() * w.bh;
  Tensor out = torch::stable::new_empty(grad, {M, w.K});
  float* to = static_cast<float*>(out.mutable_data_ptr());
  if (M == 0 || w.K == 0) return out;
  TurnedBlocks turned(w);
  const BlockColumns list{turned.offsets.data(), turned.blocks.data(), turned.rows.data()};
  const int64_t threads = block_threads(double(w.offsets[w.rows()]) * double(w.size() * wide));
  Workspace<float> panel(height * wide + 1);
  for (int64_t first = 0; first < M; first += wide) {
    const int64_t count = std::min(wide, M - first);
    share_evenly(height, threads, [&](int64_t begin, int64_t end) {
      LW_SELECT(block_turn)(g + first * w.N, w.N, count, begin, end, w.N, panel.data());
    });
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      const int64_t from = share_blocks(list.offsets, w.columns_of_blocks(), begin, threads);
      const int64_t until = share_blocks(list.offsets, w.columns_of_blocks(), end, threads);
      LW_SELECT(block_grad_x)(panel.data(), int(count), w, list, from, until, to + first * w.K);
    });
  }
  return out;
}

Tensor block_linear_grad_values(const Tensor& grad, const Tensor& x, const Tensor& row_offsets,
                                const Tensor& columns, const Tensor& /*schedule*/,
                                std::vector<int64_t> block) {
  const char* op = "block_linear_grad_values";
  constexpr int64_t kBatch = 512;  // samples sorted into blocks at a time
  const float* g = checked_data<float>(op, "grad", grad, 2, ScalarType::Float);
  const float* from = checked_data<float>(op, "x", x, 2, ScalarType::Float);
  LW_CHECK(block.size() == 2, op, ": expected block [bh, bw], got ", block.size(), " sizes");
  const BlockWeight w = check_blocks(op, row_offsets, columns, grad.size(1), x.size(1), block[0], block[1]);
  const int64_t M = x.size(0), rows = w.rows(), width = w.columns_of_blocks();
  LW_CHECK(grad.size(0) == M, op, ": expected grad [", M, ", ", w.N, "], got ", shape_of(grad));
  Tensor out = torch::stable::new_zeros(x, {columns.numel(), w.bw, w.bh});
  float* to = static_cast<float*>(out.mutable_data_ptr());
  const int64_t most = std::min(M, kBatch);
  const int64_t threads = block_threads(double(columns.numel()) * double(w.size() * most));
  Workspace<float> grads(rows * w.bh * most + 1), inputs(w.padded_K() * most + 1);
  for (int64_t first = 0; first < M; first += kBatch) {
    const int64_t count = std::min(kBatch, M - first);
    share_evenly(rows, threads, [&](int64_t begin, int64_t end) {
      LW_SELECT(block_split)(g + first * w.N, w.N, count, w.N, w.bh, begin, end, grads.data());
    });
    share_evenly(width, threads, [&](int64_t begin, int64_t end) {
      LW_SELECT(block_split)(from + first * w.K, w.K, count, w.K, w.bw, begin, end, inputs.data());
    });
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      const int64_t low = share_blocks(w.offsets, rows, begin, threads);
      const int64_t high = share_blocks(w.offsets, rows, end, threads);
      LW_SELECT(block_grad_values)(grads.data(), inputs.data(), count, w, low, high, first > 0, to);
    });
  }
  return out;
}

}  // namespace
}  // namespace liveweight

STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) {
  m.impl("block_linear_grad_x", TORCH_BOX(&liveweight::block_linear_grad_x));
  m.impl("block_linear_grad_values", TORCH_BOX(&liveweight::block_linear_grad_values));
}
#endif  // LW_BASE
