// Per feature: sum |x|, sum x^2, count(|x| > eps), max |x|, of x [N, F, P] over N and P.
//
// Two stages, no atomics: stage one leaves partials [splits, 4, width] in double, stage two adds
// them into stats [4, F]. Where one split does it all, stage one adds into stats and that is all.
// The split depends on the shape alone, never on the device, so the bits of the result do not
// depend on the GPU or on the run.
//
// Floor: one read of x. bytes(x) / 4.3 TB/s on an H200 (its measured copy bandwidth), e.g. 15.6 us
// for 8192 x 4096 bf16. The partials of columns, 32 bytes per column and split, are written and
// read beside it, mostly in L2: 6 % of x each in that example, 25 % at the worst (64 rows per
// split). A launch costs microseconds, which small inputs show: up to 128 rows take one.
//
// Precision: each thread sums at most kWindow terms in float before it adds them to a double; all
// terms are >= 0, so the relative error of the sums is below kWindow * 2^-24 = 1.9e-6. x^2 is
// formed in float: |x| above 1.8e19 gives inf. NaN stays NaN in both sums and in the maximum.
#pragma once

#include <cmath>
#include <cstdint>

#include "activity_plan.cuh"
#include "launch.cuh"
#include "ptx.cuh"

namespace liveweight::cuda {

__host__ __device__ inline double merge(int k, double a, double b) {
  return k == 3 ? max_nan(a, b) : a + b;
}

// Where stage one puts the numbers of a feature: beside each other in the partials, or straight
// into stats [4, F]. `channels` > 0: the features of x are [positions, channels], those of stats
// [channels, positions], so that maps whose channels lie last are read in place.
struct Target {
  double* out;
  int64_t channels, positions;
  bool add;

  __device__ void put(int k, int64_t width, int64_t feature, double value) const {
    const int64_t at =
        channels > 0 ? feature % channels * positions + feature / channels : feature;
    double* const to = out + k * width + at;
    *to = add ? merge(k, *to, value) : value;
  }
};

// What a thread knows of one feature. The count is exact: memory ends before a thread sees 2^24.
struct Sums {
  double absolute = 0, square = 0;
  float active = 0, most = 0;

  __device__ double get(int k) const {
    return k == 0 ? absolute : k == 1 ? square : k == 2 ? double(active) : double(most);
  }
};

// At most kWindow terms, in float.
struct Window {
  float absolute = 0, square = 0;

  __device__ void take(float x, float eps, Sums& sums) {
    const float magnitude = fabsf(x);
    absolute += magnitude;
    square = fmaf(x, x, square);
    sums.active += greater(magnitude, eps);
    sums.most = max_nan(sums.most, magnitude);
  }
  __device__ void add(const Window& other) {
    absolute += other.absolute;
    square += other.square;
  }
  __device__ void flush(Sums& sums) const {
    sums.absolute += absolute;
    sums.square += square;
  }
};

template <typename T, int V>
__device__ inline void load_elements(const T* address, float (&out)[V]) {
  if constexpr (V == 1) {
    out[0] = to_float(*address);
  } else {
    widen(load_streaming(address), out, T{});
  }
}

// kLoads vectors that are `step` elements apart; all loads are issued before the first use.
template <int kLoads, typename T, int V>
__device__ inline void take_vectors(const T* next, int64_t step, float eps, Window (&window)[V],
                                    Sums (&sums)[V]) {
  float value[kLoads][V];
#pragma unroll
  for (int u = 0; u < kLoads; ++u) load_elements<T, V>(next + u * step, value[u]);
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
#pragma unroll
    for (int v = 0; v < V; ++v) window[v].take(value[u][v], eps, sums[v]);
  }
}

// Adds up `count` vectors, `step` elements apart, column by column.
template <typename T, int V>
__device__ inline void sum_columns(const T* next, int64_t step, int64_t count, float eps,
                                   Sums (&sums)[V]) {
  while (count > 0) {
    Window window[V];
    // The last kInFlight - 1 places of a window are for the remainder.
    for (int n = kInFlight; n < kWindow && count >= kInFlight; n += kInFlight) {
      take_vectors<kInFlight>(next, step, eps, window, sums);
      next += kInFlight * step;
      count -= kInFlight;
    }
    if (count < kInFlight) {
      for (; count > 0; --count, next += step) take_vectors<1>(next, step, eps, window, sums);
    }
#pragma unroll
    for (int v = 0; v < V; ++v) window[v].flush(sums[v]);
  }
}

// Stage one, columns. Grid (tiles, splits); a block is across x (kThreads / across) threads.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    column_stats(const T* x, int64_t rows, int64_t width, int64_t rows_per_split, int across,
                 float eps, Target target) {
  __shared__ double tile[kThreads * V];
  const int down = kThreads / across;
  const int lane = int(threadIdx.x) % across, line = int(threadIdx.x) / across;
  const int64_t column = (int64_t(blockIdx.x) * across + lane) * V;
  const int64_t first = blockIdx.y * rows_per_split + line;
  const int64_t end = (blockIdx.y + 1) * rows_per_split;
  const int64_t last = end < rows ? end : rows;

  Sums sums[V];
  // Columns come in whole vectors (width % V == 0), so one comparison guards all V.
  if (column < width) {
    sum_columns(x + first * width + column, down * width, ceil_div(last - first, down), eps, sums);
  }

  target.out += int64_t(blockIdx.y) * kStats * width;
  const int tile_width = across * V;
  const int64_t tile_start = int64_t(blockIdx.x) * tile_width;
  for (int k = 0; k < kStats; ++k) {
#pragma unroll
    for (int v = 0; v < V; ++v) tile[line * tile_width + lane * V + v] = sums[v].get(k);
    __syncthreads();
    for (int c = threadIdx.x; c < tile_width && tile_start + c < width; c += kThreads) {
      double total = tile[c];
      for (int l = 1; l < down; ++l) total = merge(k, total, tile[l * tile_width + c]);
      target.put(k, width, tile_start + c, total);
    }
    __syncthreads();
  }
}

// Walks along the runs of one feature, 16 bytes (a slot) at a time, `group` slots per step. Where a
// run does not begin on a 16-byte boundary (kAligned false) its slots are still whole aligned
// blocks: what they hold of the neighbours is replaced by 0, which adds nothing.
template <typename T, int V, bool kAligned>
struct RunWalk {
  const T* x;
  int64_t total, start, row_stride;  // elements; start of the present run
  int run, slots, slot, row_step, slot_step, misalignment;

  __device__ void load(float (&out)[V]) const {
    if constexpr (kAligned) {
      load_elements<T, V>(x + start + int64_t(slot) * V, out);
      return;
    }
    const int offset = slot * V - int((start + misalignment) & (V - 1));
    const int64_t address = start + offset;
    const bool inside = address >= 0 && address + V <= total;
    if (inside) load_elements<T, V>(x + address, out);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const bool mine = unsigned(offset + v) < unsigned(run);
      out[v] = !mine ? 0.f : inside ? out[v] : to_float(x[address + v]);
    }
  }
  __device__ void step() {
    start += row_step * row_stride;
    slot += slot_step;
    if (slot >= slots) {
      slot -= slots;
      start += row_stride;
    }
  }
};

template <int kLoads, typename Walk, int V>
__device__ inline void take_slots(Walk& walk, float eps, Sums& sums, float (&value)[kLoads][V]) {
  static_assert(kLoads * V <= kWindow);
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    walk.load(value[u]);
    walk.step();
  }
  Window window[kLoads];  // one per load, so that their additions do not wait for each other
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
#pragma unroll
    for (int v = 0; v < V; ++v) window[u].take(value[u][v], eps, sums);
    if (u > 0) window[0].add(window[u]);
  }
  window[0].flush(sums);
}

// Stage one, runs. Grid (tiles, splits); a block holds kThreads / group features.
template <typename T, int V, bool kAligned>
__global__ void __launch_bounds__(kThreads, 3)
    run_stats(const T* x, int64_t rows, int64_t features, int run, int slots,
              int64_t slots_per_split, int group, int misalignment, float eps, Target target) {
  __shared__ double by_warp[kThreads / kWarp][kStats];
  const int64_t block_feature = int64_t(blockIdx.x) * (kThreads / group);
  const int64_t feature = block_feature + int(threadIdx.x) / group;
  const int64_t work = feature < features ? rows * slots : 0;
  const int64_t first = blockIdx.y * slots_per_split + int(threadIdx.x) % group;
  const int64_t end = (blockIdx.y + 1) * slots_per_split;
  const int64_t row = first / slots;
  const int64_t row_stride = features * run;
  RunWalk<T, V, kAligned> walk{x, rows * row_stride, row * row_stride + feature * run, row_stride,
                               run, slots, int(first - row * slots), group / slots, group % slots,
                               misalignment};

  Sums sums;
  int64_t count = ceil_div((end < work ? end : work) - first, group);
  for (; count >= kInFlight; count -= kInFlight) {
    float value[kInFlight][V];
    take_slots(walk, eps, sums, value);
  }
  for (; count > 0; --count) {
    float value[1][V];
    take_slots(walk, eps, sums, value);
  }

  for (int k = 0; k < kStats; ++k) {
    double value = sums.get(k);
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      value = merge(k, value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    if (threadIdx.x % kWarp == 0) by_warp[threadIdx.x / kWarp][k] = value;
  }
  __syncthreads();
  target.out += int64_t(blockIdx.y) * kStats * features;
  const int warps = group / kWarp;
  for (int i = threadIdx.x; i < kStats * (kThreads / group); i += kThreads) {
    const int k = i % kStats, f = i / kStats;
    if (block_feature + f >= features) break;
    double value = by_warp[f * warps][k];
    for (int w = 1; w < warps; ++w) value = merge(k, value, by_warp[f * warps + w][k]);
    target.put(k, features, block_feature + f, value);
  }
}

constexpr int kCombineLines = 16;

// Stage two: adds partials[:, k, f * fold : (f + 1) * fold] to feature f. Grid (ceil(F / 32), 4).
static __global__ void __launch_bounds__(kWarp* kCombineLines)
    combine_stats(const double* partials, int64_t splits, int64_t features, int64_t fold,
                  Target target) {
  __shared__ double tile[kCombineLines][kWarp + 1];
  const int k = blockIdx.y;
  const int lane = threadIdx.x % kWarp, line = threadIdx.x / kWarp;
  const int64_t feature = int64_t(blockIdx.x) * kWarp + lane;
  double total = 0;
  if (feature < features) {
    for (int64_t split = line; split < splits; split += kCombineLines) {
      const double* part = partials + ((split * kStats + k) * features + feature) * fold;
      for (int64_t i = 0; i < fold; ++i) total = merge(k, total, part[i]);
    }
  }
  tile[line][lane] = total;
  __syncthreads();
  if (line == 0 && feature < features) {
    for (int l = 1; l < kCombineLines; ++l) total = merge(k, total, tile[l][lane]);
    target.put(k, features, feature, total);
  }
}

// Both stages; partials holds plan.splits * 4 * plan.width doubles unless plan.one_launch. eps and
// channels >= 0; channels divide the features.
template <typename T>
void activity_stats(const T* x, Extent e, const Plan& plan, double eps, int64_t channels,
                    double* partials, double* stats, Launch launch) {
  constexpr int kWide = 16 / int(sizeof(T));
  // Rounded down, so that the comparison in float gives what one in double would.
  float threshold = float(eps);
  if (double(threshold) > eps) threshold = std::nextafter(threshold, 0.f);
  const Shape shape{grid(plan.tiles, plan.splits), kThreads};
  const Target final{stats, channels, channels > 0 ? e.features / channels : 0, true};
  const Target target = plan.one_launch ? final : Target{partials, 0, 0, false};
  if (plan.columns) {
    auto kernel = plan.vector == 1 ? column_stats<T, 1> : column_stats<T, kWide>;
    launch(kernel, shape, x, e.rows, plan.width, plan.per_split, plan.across, threshold, target);
  } else {
    const int misalignment = int(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
    auto kernel = plan.aligned ? run_stats<T, kWide, true> : run_stats<T, kWide, false>;
    launch(kernel, shape, x, e.rows, e.features, int(e.run), int(plan.slots), plan.per_split,
           plan.group, misalignment, threshold, target);
  }
  if (plan.one_launch) return;
  launch(combine_stats, Shape{grid(ceil_div(e.features, kWarp), kStats), kWarp * kCombineLines},
         partials, plan.splits, e.features, plan.fold, final);
}

}  // namespace liveweight::cuda
