// activity_stats_: sum, sum of squares, count above eps and max of |x|, per feature, in one read.
//
// x is [N, F, P]; the sums run over N and P. Short planes (P < 16) are summed down the columns of
// [N, F * P]; long ones along each row. Both keep fp32 lane sums and add them to double totals
// after at most 256 additions: plain fp32 sums drift to 1e-5 at 60000 rows.
#include "dispatch.h"
#include "simd.h"

namespace liveweight {

enum ActivityType { kFloat32, kBfloat16, kFloat16 };

// One task: `rows` samples of `features` neighbouring features, added to out [4, features].
struct ActivityPart {
  const void* x;
  ActivityType type;
  int64_t rows;
  int64_t row_stride;  // elements between samples
  int64_t features;
  int64_t plane;
  float eps;
  double* out;
  int64_t out_stride;  // elements between the four rows of out
};

constexpr int64_t kFlush = 256;         // fp32 additions before a flush to double
constexpr int64_t kShortPlane = 16;     // planes below this go down the columns
constexpr int64_t kColumnTile = 1024;   // columns of a task: four fp32 sums each stay in L1
constexpr int64_t kFeatureTile = 32;    // features of a task with long planes

}  // namespace liveweight

LW_DECLARE(void activity_columns(const ActivityPart& part))
LW_DECLARE(void activity_planes(const ActivityPart& part))

namespace liveweight::LW_ISA {
namespace {

struct Sums {
  Vec sum, square, count, top;
};

LW_INLINE Sums no_sums() { return {zero(), zero(), zero(), zero()}; }

LW_INLINE void add(Sums& s, Vec x, Vec eps) {
  const Vec size = abs(x);
  s.sum += size;
  s.square = fma(size, size, s.square);
  s.count = count_greater(s.count, size, eps);
  s.top = max(s.top, size);
}

// Adds |x| and x^2 of a strided block in double: for the rare block whose fp32 sums overflowed.
template <class T>
__attribute__((noinline)) void exact_sums(const T* x, int64_t rows, int64_t row_stride,
                                          int64_t columns, double* sum, double* square) {
  *sum = *square = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const double value = to_float(x[r * row_stride + c]);
      *sum += __builtin_fabs(value);
      *square += value * value;
    }
  }
}

constexpr int32_t kInfinity = 0x7f800000;

LW_INLINE int32_t size_bits(float value) { return int32_t(float_to_bits(value) & 0x7fffffffu); }

// The larger of old and top, NaN if either is or if the sum is: the vector max drops a NaN when
// another value follows, the sum keeps it. In integers, where sizes order alike and NaN comes last,
// because the compiler vectorizes no float comparison that could raise a flag.
LW_INLINE double merge_top(double old, float top, float sum) {
  const int32_t size = size_bits(sum) > kInfinity ? size_bits(sum) : size_bits(top);
  const double wide = bits_to_float(uint32_t(size));
  int64_t a, b;
  __builtin_memcpy(&a, &old, sizeof a);
  __builtin_memcpy(&b, &wide, sizeof b);
  a = a > b ? a : b;
  __builtin_memcpy(&old, &a, sizeof a);
  return old;
}

// ---- down the columns: x [rows, columns], four fp32 sums per column

template <class T, int kRows>
LW_INLINE void add_rows(const T* x, int64_t stride, int64_t columns, Vec eps,
                        float (*sums)[kColumnTile + kLanes]) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int n = int(columns - c < kLanes ? columns - c : kLanes);
    Sums s = no_sums();  // few terms first, then their sum: rounds far less than one long chain
    if (n == kLanes) {
      for (int r = 0; r < kRows; ++r) add(s, load(x + r * stride + c), eps);
    } else {
      for (int r = 0; r < kRows; ++r) add(s, load_first(x + r * stride + c, n), eps);
    }
    store(sums[0] + c, load(sums[0] + c) + s.sum);
    store(sums[1] + c, load(sums[1] + c) + s.square);
    store(sums[2] + c, load(sums[2] + c) + s.count);
    store(sums[3] + c, max(load(sums[3] + c), s.top));
  }
}

template <class T>
void flush_columns(const ActivityPart& part, const T* x, int64_t rows,
                   float (*sums)[kColumnTile + kLanes]) {
  const int64_t columns = part.features * part.plane;
  double* __restrict sum = part.out;
  double* __restrict square = sum + part.out_stride;
  double* __restrict count = square + part.out_stride;
  double* __restrict top = count + part.out_stride;
  int32_t largest = 0;
  for (int64_t c = 0; c < columns; ++c) {
    largest = size_bits(sums[1][c]) > largest ? size_bits(sums[1][c]) : largest;
  }
  if (part.plane == 1 && largest < kInfinity) {
    for (int64_t c = 0; c < columns; ++c) {
      sum[c] += sums[0][c];
      square[c] += sums[1][c];
      count[c] += sums[2][c];
      top[c] = merge_top(top[c], sums[3][c], sums[0][c]);
    }
    return;
  }
  for (int64_t c = 0; c < columns; ++c) {
    const int64_t f = c / part.plane;
    double block_sum = sums[0][c], block_square = sums[1][c];
    if (block_square > __FLT_MAX__) {
      exact_sums(x + c, rows, part.row_stride, 1, &block_sum, &block_square);
    }
    sum[f] += block_sum;
    square[f] += block_square;
    count[f] += sums[2][c];
    top[f] = merge_top(top[f], sums[3][c], sums[0][c]);
  }
}

template <class T>
void columns_of(const ActivityPart& part) {
  alignas(64) float sums[4][kColumnTile + kLanes];
  const T* x = static_cast<const T*>(part.x);
  const int64_t columns = part.features * part.plane;
  const Vec eps = broadcast(part.eps);
  for (int64_t begin = 0; begin < part.rows; begin += kFlush) {
    const int64_t rows = part.rows - begin < kFlush ? part.rows - begin : kFlush;
    const T* block = x + begin * part.row_stride;
    for (auto& row : sums) __builtin_memset(row, 0, size_t(columns + kLanes) * sizeof(float));
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8) {
      add_rows<T, 8>(block + r * part.row_stride, part.row_stride, columns, eps, sums);
    }
    for (; r < rows; ++r) {
      add_rows<T, 1>(block + r * part.row_stride, part.row_stride, columns, eps, sums);
    }
    flush_columns(part, block, rows, sums);
  }
}

// ---- along the planes: one set of lane sums per feature

template <class T>
LW_INLINE void add_plane(const T* x, int64_t n, Vec eps, Sums& sums) {
  Sums a = no_sums(), b = no_sums();  // two chains hide the latency of an addition
  int64_t p = 0;
  for (; p + 2 * kLanes <= n; p += 2 * kLanes) {
    add(a, load(x + p), eps);
    add(b, load(x + p + kLanes), eps);
  }
  if (p + kLanes <= n) {
    add(a, load(x + p), eps);
    p += kLanes;
  }
  if (p < n) add(b, load_first(x + p, int(n - p)), eps);
  sums.sum += a.sum + b.sum;
  sums.square += a.square + b.square;
  sums.count += a.count + b.count;
  sums.top = max(sums.top, max(a.top, b.top));
}

template <class T>
void flush_plane(const ActivityPart& part, int64_t f, const T* x, int64_t rows, int64_t n,
                 const Sums& sums) {
  float lanes[4][kLanes];
  store(lanes[0], sums.sum);
  store(lanes[1], sums.square);
  store(lanes[2], sums.count);
  double sum = 0, square = 0, count = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    sum += lanes[0][lane];
    square += lanes[1][lane];
    count += lanes[2][lane];
  }
  const float mark = float(sum);  // NaN where a value is
  if (square > __FLT_MAX__) exact_sums(x, rows, part.row_stride, n, &sum, &square);
  double* out = part.out + f;
  out[0] += sum;
  out[part.out_stride] += square;
  out[2 * part.out_stride] += count;
  out[3 * part.out_stride] = merge_top(out[3 * part.out_stride], reduce_max(sums.top), mark);
}

template <class T>
void planes_of(const ActivityPart& part) {
  Sums sums[kFeatureTile];
  const T* x = static_cast<const T*>(part.x);
  const Vec eps = broadcast(part.eps);
  const int64_t longest = kFlush * kLanes;
  for (int64_t p = 0; p < part.plane; p += longest) {
    const int64_t n = part.plane - p < longest ? part.plane - p : longest;
    const int64_t block = kFlush / ((n + kLanes - 1) / kLanes);  // samples between two flushes
    for (int64_t begin = 0; begin < part.rows; begin += block) {
      const int64_t rows = part.rows - begin < block ? part.rows - begin : block;
      const T* first_row = x + begin * part.row_stride + p;
      for (int64_t f = 0; f < part.features; ++f) sums[f] = no_sums();
      for (int64_t r = 0; r < rows; ++r) {
        const T* row = first_row + r * part.row_stride;
        for (int64_t f = 0; f < part.features; ++f) {
          add_plane(row + f * part.plane, n, eps, sums[f]);
        }
      }
      for (int64_t f = 0; f < part.features; ++f) {
        flush_plane(part, f, first_row + f * part.plane, rows, n, sums[f]);
      }
    }
  }
}

}  // namespace

void activity_columns(const ActivityPart& part) {
  if (part.type == kFloat32) return columns_of<float>(part);
  if (part.type == kBfloat16) return columns_of<Bf16>(part);
  columns_of<Half>(part);
}

void activity_planes(const ActivityPart& part) {
  if (part.type == kFloat32) return planes_of<float>(part);
  if (part.type == kBfloat16) return planes_of<Bf16>(part);
  planes_of<Half>(part);
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
#include <algorithm>
#include <cmath>

namespace liveweight {
namespace {

// How the work is cut: by shape alone, so that results do not depend on the number of threads.
struct Cut {
  int64_t tile;   // features of a task
  int64_t tiles;
  int64_t rows;   // samples of a task
  int64_t chunks;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Cut cut_work(int64_t N, int64_t F, int64_t P) {
  const int64_t tile = P < kShortPlane ? kColumnTile / P : kFeatureTile;
  const int64_t tiles = ceil_div(F, tile);
  const int64_t unit = P < kShortPlane ? 2 * kFlush : std::max<int64_t>(1, 65536 / (tile * P));
  const int64_t units = ceil_div(N, unit);
  const int64_t rows = ceil_div(units, std::min(units, ceil_div(64, tiles))) * unit;
  return {tile, tiles, rows, ceil_div(N, rows)};
}

// Largest float <= eps: |x| > eps then says the same in fp32 as in double.
float round_down(double eps) {
  const float nearest = static_cast<float>(eps);
  return nearest > eps ? std::nextafter(nearest, 0.0f) : nearest;
}

// Adds a chunk's partial results [4, F] to stats; with channels, from [positions, channels] to
// [channels, positions].
void merge_turned(double* stats, const double* partial, int64_t F, int64_t channels) {
  const int64_t positions = F / channels;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t p = 0; p < positions; ++p) {
      double* to = stats + c * positions + p;
      const double* from = partial + p * channels + c;
      for (int64_t k = 0; k < 3; ++k) to[k * F] += from[k * F];
      const double old = to[3 * F], top = from[3 * F];
      to[3 * F] = std::isnan(old) || old >= top ? old : top;
    }
  }
}

// Adds the chunks' partial results [chunks, 4, F] to stats, in order.
void merge(double* stats, const double* partial, int64_t chunks, int64_t F, int64_t channels) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk, partial += 4 * F) {
    if (channels > 0) {
      merge_turned(stats, partial, F, channels);
      continue;
    }
    for (int64_t i = 0; i < 3 * F; ++i) stats[i] += partial[i];
    for (int64_t i = 3 * F; i < 4 * F; ++i) {
      const double old = stats[i], top = partial[i];
      stats[i] = std::isnan(old) || old >= top ? old : top;
    }
  }
}

// Throws unless x is [N, F, P] and stats [4, F], contiguous, on the CPU and of the right types.
void check(const Tensor& stats, const Tensor& x, double eps, int64_t channels) {
  const char* op = "activity_stats_";
  const ScalarType type = x.scalar_type();
  LW_CHECK(x.dim() == 3, op, ": expected x [N, F, P], got shape ", shape_of(x));
  LW_CHECK(x.is_cpu() && x.is_contiguous(), op, ": expected contiguous x on the CPU");
  LW_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
           op, ": expected x in float32, bfloat16 or float16, got ",
           torch::headeronly::toString(type));
  LW_CHECK(eps >= 0, op, ": expected eps >= 0, got ", eps);
  LW_CHECK(channels >= 0 && (channels == 0 || x.size(1) % channels == 0), op,
           ": expected channels 0 or a divisor of the features, got ", channels, " of ", x.size(1));
  checked_data<double>(op, "stats", stats, 2, ScalarType::Double);
  LW_CHECK(stats.size(0) == 4 && stats.size(1) == x.size(1), op, ": expected stats [4, ",
           x.size(1), "], got shape ", shape_of(stats));
}

void activity_stats(Tensor stats, Tensor x, double eps, int64_t channels) {
  check(stats, x, eps, channels);
  const int64_t N = x.size(0), F = x.size(1), P = x.size(2);
  if (N * F * P == 0) return;
  const Cut cut = cut_work(N, F, P);
  double* totals = static_cast<double*>(stats.mutable_data_ptr());
  const bool apart = cut.chunks > 1 || channels > 0;
  Workspace<double> partial(apart ? cut.chunks * 4 * F : 0);
  double* target = apart ? partial.data() : totals;
  if (apart) std::fill_n(target, cut.chunks * 4 * F, 0.0);

  const ScalarType type = x.scalar_type();
  ActivityPart whole{x.const_data_ptr(), kFloat32, N, F * P, F, P, round_down(eps), target, F};
  if (type != ScalarType::Float) whole.type = type == ScalarType::Half ? kFloat16 : kBfloat16;
  const int64_t item = type == ScalarType::Float ? 4 : 2;  // bytes
  const int64_t grain = 1 + 32768 / (cut.rows * cut.tile * P);
  const auto kernel = P < kShortPlane ? LW_SELECT(activity_columns) : LW_SELECT(activity_planes);
  parallel_for(cut.chunks * cut.tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / cut.tiles, row = chunk * cut.rows;
      const int64_t f = task % cut.tiles * cut.tile;
      ActivityPart part = whole;
      part.x = static_cast<const char*>(whole.x) + (row * F + f) * P * item;
      part.rows = std::min(cut.rows, N - row);
      part.features = std::min(cut.tile, F - f);
      part.out = target + chunk * 4 * F + f;
      kernel(part);
    }
  });
  if (apart) merge(totals, partial.data(), cut.chunks, F, channels);
}

}  // namespace
}  // namespace liveweight

STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) {
  m.impl("activity_stats_", TORCH_BOX(&liveweight::activity_stats));
}
#endif  // LW_BASE
