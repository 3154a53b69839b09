// y = act(x W^T + b) for W in tiles of rows and columns with one-byte columns.
//
// Batches are turned into panels (panels.h): one kept weight is then one broadcast and a few
// multiply-adds. The columns of a tile are so few that their part of the panel stays in the
// first-level cache, values and columns are read as one stream, and the sums of a block of rows stay
// close. Up to four samples have too few lanes to share: their input is gathered
// (unstructured_linear_gather.cpp). The order of a sum never depends on threads.
#include "unstructured_linear.h"

#include "activation.h"

namespace liveweight {

// What becomes of the sums of a block of rows.
struct RowsOut {
  const float* bias;  // of the block's first row, or null
  float* y;           // of the panel's first sample and the block's first row
  int64_t sample_step, row_step;
  int activation;
};

}  // namespace liveweight

LW_DECLARE(void linear_fill(const float* x, int64_t row, int64_t column, int64_t K, Panel panel,
                            int64_t begin, int64_t end, float* out))
LW_DECLARE(void linear_block(const float* panel, int width, const Tiles& w, int64_t block, float* sums))
LW_DECLARE(void linear_finish(float* sums, int samples, int width, int rows, const RowsOut& out))

namespace liveweight::LW_ISA {

// Columns [begin, end) of the panel's samples; x[m, k] is x[m * row + k * column]. Columns from K to
// end, which fill up the last tile, become 0: no entry names them.
void linear_fill(const float* x, int64_t row, int64_t column, int64_t K, Panel panel, int64_t begin,
                 int64_t end, float* out) {
  const int64_t stop = end < K ? end : K;
  x += panel.first * row;
  if (column == 1) {
    fill_panel(x, row, panel.count, panel.width, begin, stop, out);
  } else {
    for (int64_t k = begin; k < stop; ++k) {
      const float* from = x + k * column;
      float* to = out + k * panel.width;
      int m = 0;
      for (; m + kLanes <= panel.count; m += kLanes) store(to + m, load(from + m));
      if (m < panel.count) store_first(to + m, load_first(from + m, panel.count - m), panel.count - m);
      for (m = panel.count; m < panel.width; ++m) to[m] = 0.0f;
    }
  }
  for (int64_t i = stop * panel.width; i < end * panel.width; ++i) out[i] = 0.0f;
}

// The column numbers of eight entries in one word, or of one entry.
struct Bytes {
  typedef uint8_t Index;
  uint64_t word;
  explicit Bytes(const uint8_t* p) { __builtin_memcpy(&word, p, sizeof word); }
  int64_t at(int i) const { return int64_t(word >> (8 * i) & 255); }
};
struct Shorts {
  typedef uint16_t Index;
  uint64_t word[2];
  explicit Shorts(const uint16_t* p) { __builtin_memcpy(word, p, sizeof word); }
  int64_t at(int i) const { return int64_t(word[i / 4] >> (16 * (i % 4)) & 65535); }
};

// sums[0 .. kWidth) += sum over `count` entries of value * row of the panel.
template <int kWidth, class Eight>
LW_INLINE void add_segment(const float* panel, const float* values, const typename Eight::Index* places,
                           int count, float* sums) {
  constexpr int kStep = kWidth < kLanes ? kWidth : kLanes;
  constexpr int kParts = kWidth / kStep;
  constexpr int kChains = kParts >= 4 ? 1 : 4;  // more sums hide the FMA's latency
  Lanes<kStep> acc[kChains][kParts];
#pragma GCC unroll 16
  for (int part = 0; part < kParts; ++part) acc[0][part] = load_lanes<kStep>(sums + part * kStep);
#pragma GCC unroll 8
  for (int chain = 1; chain < kChains; ++chain) {
#pragma GCC unroll 16
    for (int part = 0; part < kParts; ++part) acc[chain][part] = Lanes<kStep>{};
  }
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    const Eight eight(places + i);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const float* row = panel + eight.at(j) * kWidth;
#pragma GCC unroll 16
      for (int part = 0; part < kParts; ++part) {
        acc[j % kChains][part] += values[i + j] * load_lanes<kStep>(row + part * kStep);
      }
    }
  }
  for (; i < count; ++i) {
    const float* row = panel + int64_t(places[i]) * kWidth;
#pragma GCC unroll 16
    for (int part = 0; part < kParts; ++part) {
      acc[0][part] += values[i] * load_lanes<kStep>(row + part * kStep);
    }
  }
#pragma GCC unroll 16
  for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 8
    for (int chain = 1; chain < kChains; ++chain) acc[0][part] += acc[chain][part];
    store_lanes<kStep>(sums + part * kStep, acc[0][part]);
  }
}

template <int kWidth, class Eight>
void block_of_tiles(const float* panel, const Tiles& w, int64_t block, float* sums) {
  typedef typename Eight::Index Index;
  for (int64_t i = 0; i < w.rows * kWidth; i += 4) store_lanes<4>(sums + i, Lanes<4>{});
  const int32_t* at = w.offsets + 2 * block * w.along;
  const float* values = w.values + at[0];
  const Index* places = static_cast<const Index*>(w.places) + at[0];
  for (int64_t t = 0; t < w.along; ++t, at += 2, panel += w.columns * kWidth) {
    const Index* segment = static_cast<const Index*>(w.segments) + 2 * int64_t(at[1]);
    const Index* stop = static_cast<const Index*>(w.segments) + 2 * int64_t(at[3]);
    for (; segment < stop; segment += 2) {
      const int count = int(segment[1]) + 1;
      prefetch_entries(values, places, count);
      add_segment<kWidth, Eight>(panel, values, places, count, sums + int64_t(segment[0]) * kWidth);
      values += count;
      places += count;
    }
  }
}

// sums [rows of a tile, width] of one block of rows and one panel.
void linear_block(const float* panel, int width, const Tiles& w, int64_t block, float* sums) {
#define LW_RUN(kWidth)                                              \
  (w.wide ? block_of_tiles<kWidth, Shorts>(panel, w, block, sums) \
          : block_of_tiles<kWidth, Bytes>(panel, w, block, sums))
  if (width == 64) LW_RUN(64);
  else if (width == 32) LW_RUN(32);
  else if (width == 16) LW_RUN(16);
  else LW_RUN(8);
#undef LW_RUN
}

// sums [rows, width] (+)= bias, then the activation, in place.
LW_INLINE void activate_sums(float* sums, int width, int rows, const RowsOut& out) {
  for (int r = 0; r < rows; ++r) {
    float* row = sums + r * width;
    const float shift = out.bias ? out.bias[r] : 0.0f;
    int m = 0;
    if (out.activation <= kRelu) {
      const float low = out.activation == kRelu ? 0.0f : -__builtin_inff();
      for (; m + 4 <= width; m += 4) {
        const Lanes<4> v = load_lanes<4>(row + m) + shift;
        store_lanes<4>(row + m, v < low ? Lanes<4>{} + low : v);
      }
    }
    for (; m + kLanes <= width; m += kLanes) {
      store(row + m, activate(load(row + m) + broadcast(shift), out.activation));
    }
    for (; m < width; ++m) row[m] = activate(row[m] + shift, out.activation);
  }
}

// sums [rows, width] to act(sums + bias), transposed where samples come first in y.
void linear_finish(float* sums, int samples, int width, int rows, const RowsOut& out) {
  if (out.bias || out.activation != kNone) activate_sums(sums, width, rows, out);
  if (out.sample_step == 1) {
    for (int r = 0; r < rows; ++r) {
      float* y = out.y + r * out.row_step;
      int m = 0;
      for (; m + kLanes <= samples; m += kLanes) store(y + m, load(sums + r * width + m));
      if (m < samples) store_first(y + m, load_first(sums + r * width + m, samples - m), samples - m);
    }
  } else {
    empty_panel(sums, width, samples, rows, out.y, out.sample_step);
  }
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {
namespace {

constexpr int kGathered = 4;  // samples up to which gathering beats panels

struct Linear {
  const float* x;
  int64_t x_row, x_column;  // steps from sample to sample and from feature to feature
  int64_t M, K, N;
  Tiles w;
  const float* bias;
  int activation;
  float* y;
  int64_t y_row, y_column;

  int64_t padded() const { return w.along * w.columns; }

  void finish(float* sums, int64_t block, int64_t first, int samples, int width) const {
    const int64_t row = block * w.rows;
    const RowsOut out{bias ? bias + row : nullptr, y + first * y_row + row * y_column, y_row, y_column,
                      activation};
    LW_SELECT(linear_finish)(sums, samples, width, int(std::min(w.rows, N - row)), out);
  }

  void fill(const Panel& panel, int64_t begin, int64_t end, float* out) const {
    LW_SELECT(linear_fill)(x, x_row, x_column, K, panel, begin, end, out);
  }

  void run_blocks(const float* filled, const Panel& panel, int64_t begin, int64_t end, float* sums) const {
    for (int64_t block = begin; block < end; ++block) {
      LW_SELECT(linear_block)(filled, panel.width, w, block, sums);
      finish(sums, block, panel.first, panel.count, panel.width);
    }
  }

  // Each worker fills and uses panels of its own.
  void run_by_panel(const std::vector<Panel>& panels, int64_t threads) const {
    const int64_t count = int64_t(panels.size());
    parallel_for(count, (count + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      const int64_t width = panels[size_t(begin)].width;  // the first is the widest
      Workspace<float> filled(padded() * width), sums(w.rows * width);
      for (int64_t i = begin; i < end; ++i) {
        fill(panels[size_t(i)], 0, padded(), filled.data());
        run_blocks(filled.data(), panels[size_t(i)], 0, w.blocks, sums.data());
      }
    });
  }

  // All panels are filled together; then each worker takes a share of the blocks through all of them.
  void run_by_blocks(const std::vector<Panel>& panels, int64_t threads) const {
    int64_t lanes = 0;
    for (const Panel& panel : panels) lanes += panel.width;
    Workspace<float> filled(padded() * lanes);
    parallel_for(padded(), (padded() + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      float* at = filled.data();
      for (const Panel& panel : panels) {
        fill(panel, begin, end, at);
        at += padded() * panel.width;
      }
    });
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      Workspace<float> sums(w.rows * 64);
      const float* at = filled.data();
      for (const Panel& panel : panels) {
        run_blocks(at, panel, share_blocks(w, begin, threads), share_blocks(w, end, threads), sums.data());
        at += padded() * panel.width;
      }
    });
  }

  void run_gathered(int64_t threads) const {
    // Samples as rows of whole tiles, so that any column number names memory that is there.
    const bool copy = x_column != 1 || padded() != K;
    Workspace<float> rows(copy ? M * padded() : 0);
    for (int64_t m = 0; copy && m < M; ++m) {
      for (int64_t k = 0; k < K; ++k) rows[m * padded() + k] = x[m * x_row + k * x_column];
      std::fill(rows.data() + m * padded() + K, rows.data() + (m + 1) * padded(), 0.0f);
    }
    const float* from = copy ? rows.data() : x;
    const int64_t step = copy ? padded() : x_row;
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      Workspace<float> lanes(w.rows * M * 16), sums(w.rows * M);
      for (int64_t b = share_blocks(w, begin, threads); b < share_blocks(w, end, threads); ++b) {
        LW_SELECT(linear_gather)(from, step, int(M), w, b, lanes.data(), sums.data());
        finish(sums.data(), b, 0, int(M), int(M));
      }
    });
  }

  void run() const {
    if (M == 0 || N == 0) return;
    // A gathered multiply-add takes as long as six in lanes.
    const int64_t threads = threads_for(double(kept_entries(w)) * double(M <= kGathered ? 6 * M : M));
    if (M <= kGathered) return run_gathered(threads);
    const std::vector<Panel> panels = split_panels(0, M, 8);
    const int64_t count = int64_t(panels.size());
    const bool even = M % 64 == 0 && count % threads == 0;
    if (threads == 1 || even || count >= 4 * threads) return run_by_panel(panels, threads);
    run_by_blocks(panels, threads);
  }
};

Tensor unstructured_linear(const Tensor& x, const Tensor& values, const Tensor& columns,
                           const Tensor& segments, const Tensor& offsets, const std::vector<int64_t>& tile,
                           int64_t out_features, const std::optional<Tensor>& bias, int64_t activation,
                           bool batch_last) {
  const char* op = "unstructured_linear";
  LW_CHECK(x.dim() == 2, op, ": expected 2-D x, got shape ", shape_of(x));
  Linear job{};
  job.M = x.size(0), job.K = x.size(1), job.N = out_features;
  const bool last = !x.is_contiguous();  // sample after sample in a feature
  job.x = checked_data<float>(op, "x", last ? torch::stable::transpose(x, 0, 1) : x, 2, ScalarType::Float);
  job.x_row = last ? 1 : job.K, job.x_column = last ? job.M : 1;
  job.w = check_tiles(op, values, columns, segments, offsets, tile, job.N, job.K);
  if (bias) {
    job.bias = checked_data<float>(op, "bias", *bias, 1, ScalarType::Float);
    LW_CHECK(bias->numel() == job.N, op, ": expected bias [", job.N, "], got ", shape_of(*bias));
  }
  LW_CHECK(activation >= 0 && activation < kActivations, op, ": unknown activation ", activation);
  job.activation = int(activation);
  Tensor y = torch::stable::new_empty(x, batch_last ? std::vector<int64_t>{job.N, job.M}
                                                    : std::vector<int64_t>{job.M, job.N});
  job.y = static_cast<float*>(y.mutable_data_ptr());
  job.y_row = batch_last ? 1 : job.N, job.y_column = batch_last ? job.M : 1;
  job.run();
  return batch_last ? torch::stable::transpose(y, 0, 1) : y;
}

}  // namespace
}  // namespace liveweight

STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) {
  m.impl("unstructured_linear", TORCH_BOX(&liveweight::unstructured_linear));
}
#endif  // LW_BASE
