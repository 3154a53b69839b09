// kernelwise_conv2d with 3 x 3 kernels of stride 2, one sample at a time.
//
// Every kernel column gets planes of its own, which hold just the input columns that it reads: each tap of a
// row of outputs is then one aligned vector. Narrow outputs are folded: the lanes hold equal parts of the rows
// side by side.
#include "kernelwise_conv2d_finish.h"
#include "kernelwise_conv2d_sums.h"

namespace liveweight {

struct StridedJob {
  KeptFilters filters;
  int64_t H, W, height, width, padding[2];  // height, width: of the output before any pooling
  int64_t parts, slot, rows, vectors;       // part g begins with row g * rows; slot: lanes of its rows
  const float *begin, *end;                 // of x

  int64_t stored() const { return 2 * rows + 1; }  // input rows of a part
  int64_t row(int64_t lanes) const { return vectors * lanes; }
  int64_t plane(int64_t lanes) const { return 3 * stored() * row(lanes); }
};

}  // namespace liveweight

LW_DECLARE(void strided_planes(const float* x, const StridedJob& job, int64_t begin, int64_t end, float* copy,
                               float* planes))
LW_DECLARE(void strided_filters(const float* planes, const StridedJob& job, const int32_t* order, int64_t count,
                                float* scratch, float* y))

namespace liveweight::LW_ISA {

constexpr int kStridedRows = kRegisters >= 32 ? 8 : 4;

// p[0], p[2], ..., p[2 * kLanes - 2]
LW_INLINE Vec load_even(const float* p) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return {_mm512_permutex2var_ps(load(p).v, even, load(p + kLanes).v)};
#else
  float numbers[kLanes];
  for (int i = 0; i < kLanes; i += 4) {
    const Lanes<4> low = load_lanes<4>(p + 2 * i), high = load_lanes<4>(p + 2 * i + 4);
    store_lanes<4>(numbers + i, LW_SHUFFLE(low, high, 0, 2, 4, 6));
  }
  return load(numbers);
#endif
}

// Which lanes of a row's first and last vector are inside the picture for each kernel column, and how many are
// stored.
struct StridedRow {
  uint32_t first[3], last[3];
  int64_t left, vectors, column;  // left: column of the picture under the first lane of kernel column 0
  Mask stored;
};

// A row of the picture to the planes of all kernel columns. Reads whole vectors beside the row.
LW_INLINE void spread_row(const float* row, const StridedRow& spread, float* out) {
  for (int64_t v = 0; v < spread.vectors; ++v) {
    const float* from = row + spread.left + 2 * v * kLanes;
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      const uint32_t first = v == 0 ? spread.first[j] : ~0u, last = v + 1 == spread.vectors ? spread.last[j] : ~0u;
      const Vec numbers = select(mask_from_bits(first & last & ((1u << kLanes) - 1)), load_even(from + j), zero());
      store(out + j * spread.column + v * kLanes, numbers, spread.stored);
    }
  }
}

// Channels [begin, end) of a sample: [channel][kernel column][input row][lanes]. Rows at either end of x are read
// from a copy, which has room for the vectors beside them.
void strided_planes(const float* x, const StridedJob& job, int64_t begin, int64_t end, float* copy, float* planes) {
  const int64_t row = job.row(kLanes), lanes = job.parts > 1 ? job.slot : row, size = job.H * job.W;
  StridedRow spread;
  spread.left = -job.padding[1];
  spread.vectors = job.vectors;
  spread.column = job.stored() * row;
  spread.stored = first(int(lanes < kLanes ? lanes : kLanes));
  for (int j = 0; j < 3; ++j) {
    const int64_t inside = (job.W - spread.left - j + 1) / 2 - (job.vectors - 1) * kLanes;
    spread.first[j] = spread.left + j < 0 ? ~1u : ~0u;
    spread.last[j] = (1u << clamp(inside, 0, kLanes)) - 1;
  }
  for (int64_t c = begin; c < end; ++c, x += size) {
    float* const plane = planes + c * job.plane(kLanes);
    const bool safe = x - 2 >= job.begin && x + size + 2 * (row + kLanes) <= job.end;
    for (int64_t g = 0; g < job.parts; ++g) {
      for (int64_t t = 0; t < job.stored(); ++t) {
        const int64_t r = 2 * g * job.rows + t - job.padding[0];
        float* to = plane + t * row + g * job.slot;
        if (r < 0 || r >= job.H) {
          for (int j = 0; j < 3; ++j) fill_zero(to + j * spread.column, lanes);
        } else if (safe) {
          spread_row(x + r * job.W, spread, to);
        } else {
          copy_row(x + r * job.W, 1, copy + kLanes, job.W);
          spread_row(copy + kLanes, spread, to);
        }
      }
    }
  }
}

// x points to the first kernel column's first input row. Few rows: a sum for each kernel column hides the latency
// of the multiply-adds.
template <int kRows>
void strided_tile(const float* x, const KernelList& kernels, int64_t row, int64_t column, const SumsEnd& end) {
  constexpr int kSums = kRows <= 4 ? 3 : 1;
  Vec sum[kSums][kRows];
#pragma GCC unroll 3
  for (int j = 0; j < kSums; ++j) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[j][r] = zero();
  }
  for (int32_t i = 0; i < kernels.count; ++i) {
    const float* p = x + kernels.sources[i] * int64_t(kernels.size);
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j, p += column) {
      const int at = kSums == 3 ? j : 0;
      Vec weight[3];
#pragma GCC unroll 3
      for (int a = 0; a < 3; ++a) weight[a] = broadcast(kernels.values[i * 9 + 3 * a + j]);
#pragma GCC unroll 17
      for (int t = 0; t < 2 * kRows + 1; ++t) {
        const Vec v = load(p + t * row);
        const int r = t / 2;
        if (t % 2) sum[at][r] = fma(v, weight[1], sum[at][r]);
        if (t % 2 == 0 && r < kRows) sum[at][r] = fma(v, weight[0], sum[at][r]);
        if (t % 2 == 0 && r > 0) sum[at][r - (r > 0)] = fma(v, weight[2], sum[at][r - (r > 0)]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    Vec v = sum[0][r];
    if (kSums == 3) v = v + (sum[kSums / 2][r] + sum[kSums - 1][r]);
    end_sums(v, end, end.lanes, end.out + r * end.step);
  }
}

struct StridedTable {
  using Run = void (*)(const float*, const KernelList&, int64_t, int64_t, const SumsEnd&);
  Run run[kStridedRows + 1];
  template <int kRows>
  constexpr void fill() {
    if constexpr (kRows > 0) {
      run[kRows] = &strided_tile<kRows>;
      fill<kRows - 1>();
    }
  }
  constexpr StridedTable() : run() { fill<kStridedRows>(); }
};

// Sums of one filter to end.out.
LW_INLINE void strided_sums(const float* planes, const KernelList& kernels, const StridedJob& job, const SumsEnd& end) {
  static constexpr StridedTable table;
  const int64_t row = job.row(kLanes), column = job.stored() * row;
  SumsEnd part = end;
  for (int64_t v = 0; v < job.vectors; ++v) {
    part.lanes = v + 1 == job.vectors ? end.lanes : kLanes;
    for (int64_t tiles = (job.rows + kStridedRows - 1) / kStridedRows, r = 0; tiles > 0; --tiles) {
      const int64_t rows = (job.rows - r + tiles - 1) / tiles;
      part.out = end.out + r * end.step + v * kLanes;
      table.run[rows](planes + 2 * r * row + v * kLanes, kernels, row, column, part);
      r += rows;
    }
  }
}

// Filters order[0 .. count) of a sample; y is where filter 0 goes.
void strided_filters(const float* planes, const StridedJob& job, const int32_t* order, int64_t count, float* scratch,
                     float* y) {
  const KeptFilters& filters = job.filters;
  const int64_t pool = filters.pool, row = job.row(kLanes), plane = job.plane(kLanes);
  const int64_t pixels = (job.height / pool) * (job.width / pool);
  for (int64_t n = 0; n < count; ++n) {
    const int64_t o = order[n];
    int64_t channel;
    KernelList kernels = kernels_of(filters, o, channel);
    kernels.size = int32_t(plane);
    const float bias = filters.bias ? filters.bias[o] : 0.0f;
    float* to = y + o * pixels;
    const float* from = planes + channel * plane;
    if (pool == 1 && job.parts == 1) {
      const int lanes = int(job.width - (job.vectors - 1) * kLanes);
      strided_sums(from, kernels, job, {to, job.width, lanes, bias, filters.relu});
      continue;
    }
    float* rows = scratch + job.rows * row;
    strided_sums(from, kernels, job, {scratch, row, kLanes, 0.0f, false});
    for (int64_t r = 0; r < job.height; ++r) {
      copy_row(scratch + r % job.rows * row + r / job.rows * job.slot, 1, rows + r * job.width, job.width);
    }
    if (pool == 1) finish_rows(rows, job.width, job.height, job.width, bias, filters.relu, to);
    else finish_pool(rows, job.width, job.height, job.width, pool, bias, filters.relu, to);
  }
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {
namespace {

StridedJob make_job(const KernelwiseConv& conv, int64_t lanes) {
  const ConvSizes& s = conv.sizes;
  const int64_t slot = s.width <= 4 ? 4 : 8, parts = slot * 2 <= lanes && s.width <= 8 ? lanes / slot : 1;
  return {conv.filters, s.H, s.W, s.height, s.width, {s.padding[0], s.padding[1]}, parts, slot,
          (s.height + parts - 1) / parts, (s.width + lanes - 1) / lanes, conv.x, conv.x + s.B * s.C * s.H * s.W};
}

struct StridedRun {
  const KernelwiseConv& conv;
  StridedJob job;
  int64_t lanes;

  int64_t buffer_floats(int64_t) const { return conv.sizes.C * job.plane(lanes); }
  int64_t scratch_floats() const { return job.rows * job.row(lanes) + job.height * job.width + kSlack; }

  void fill(int64_t sample, int64_t begin, int64_t end, float* planes) const {
    const float* from = conv.x + (sample * conv.sizes.C + begin) * job.H * job.W;
    Workspace<float> copy(job.W + 2 * job.row(lanes) + 4 * lanes);
    LW_SELECT(strided_planes)(from, job, begin, end, copy.data(), planes);
  }

  void filters(int64_t sample, int64_t begin, int64_t end, const std::vector<int32_t>& order, const float* planes,
               float* scratch) const {
    float* y = conv.y + sample * conv.sizes.filters * conv.out_pixels();
    LW_SELECT(strided_filters)(planes, job, order.data(), end - begin, scratch, y);
  }
};

}  // namespace

bool prefer_strided(const KernelwiseConv& conv, int64_t lanes) {
  const ConvSizes& s = conv.sizes;
  for (int d = 0; d < 2; ++d) {
    if (s.kernel[d] != 3 || s.stride[d] != 2 || s.dilation[d] != 1 || s.padding[d] > 1) return false;
  }
  return s.C * make_job(conv, lanes).plane(lanes) <= 384 * 1024;  // floats that stay in the second-level cache
}

void run_strided(const KernelwiseConv& conv, int64_t begin, int64_t end) {
  const int64_t lanes = cpu_lanes();
  run_items(StridedRun{conv, make_job(conv, lanes), lanes}, conv, begin, end);
}

}  // namespace liveweight
#endif  // LW_BASE
