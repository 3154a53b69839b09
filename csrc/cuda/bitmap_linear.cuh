// y = act(x W^T + bias) for W in formats/bitmap.py and few rows of x, on tensor cores.
//
// A warp owns 32 rows of W and takes tile after tile along K: copies of the next tiles are under way
// (cp.async, two or three slots a warp) while it decodes one straight into fragments and multiplies
// it with 8 tokens at a time; missing tokens repeat the last one and are not stored. Columns of a
// step are permuted so that 16 bytes of x are a lane's share of two steps. Warps of a block share
// out K and rows; their sums are added in shared memory, those of blocks that share out K in a
// second kernel, both in a fixed order.
//
// Floor on an H200 (4.3 TB/s, 132 multiprocessors at 1.755 GHz): 1/8 + 2 * density bytes a weight,
// which is 7.8, 5.0, 2.2 thread instructions a weight at 50, 70 and 90 % sparsity; 248, 160, 72
// clocks of a multiprocessor a tile. Compiled for sm_90a a tile takes 611 instructions a warp for 8
// tokens, and 19 more for each further 128 parts of its values: 4.8 to 4.9 a weight, of which
// decoding is 3.75. Before that, shared memory is the limit by count: 128 loads of halfwords, a
// clock each, 16 of 16 bytes, and with the copies coming in about 200 clocks a tile. So 50 % should
// run at the speed of memory, 70 % at about 4/5 of it, and sparser weights no faster than that in
// weights a second. None of this has been measured.
#pragma once

#include "activation.cuh"
#include "bitmap_plan.cuh"
#include "bitmap_tile.cuh"
#include "launch.cuh"
#include "ptx_matrix.cuh"

namespace liveweight::cuda {

template <typename T>
struct BitmapCall {
  BitmapTiles tiles;
  const T* x;  // [tokens, columns] on a 16-byte boundary, columns whole tiles
  const T* bias;
  T* y;            // [tokens, rows]
  float* partial;  // [splits, tokens, rows] if splits > 1
  int tokens;
  int64_t rows;
  int columns;
  int activation;
  BitmapPlan plan;
};

// 8 tokens x 32 columns of x, twice a B fragment: lane 4 g + t has 8 columns of token g.
template <int kGroups>
struct TokenColumns {
  Vector16 group[kGroups];
};

// Where a lane reads x: its tokens, its columns of the first pair of steps of a tile.
template <typename T, int kGroups>
struct TokenRows {
  const T* x;
  uint32_t row[kGroups];
  const T* at[kGroups];

  __device__ TokenRows(const BitmapCall<T>& call) : x(call.x) {
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      const int token = min(n * 8 + lane_id() / 4, call.tokens - 1);
      row[n] = uint32_t(token) * uint32_t(call.columns) + lane_id() % 4 * 8;
    }
  }

  __device__ void move_to(int tile) {
#pragma unroll
    for (int n = 0; n < kGroups; ++n) at[n] = x + uint32_t(row[n] + uint32_t(tile) * kTileColumns);
  }

  __device__ void load(int pair, TokenColumns<kGroups>& out) const {
#pragma unroll
    for (int n = 0; n < kGroups; ++n) out.group[n] = load_cached(at[n] + pair * 32);
  }
};

// The sums of a warp: 32 rows x 8 tokens for each group.
template <int kGroups>
struct Sums {
  float d[2][kGroups][4] = {};

  template <typename T>
  __device__ void add_pair(const BitmapLane& lane, uint32_t map, int pair,
                           const TokenColumns<kGroups>& x) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        uint32_t a[4];
        decode_fragment(lane, map, pair, step, m, a);
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
          const uint32_t b[2] = {x.group[n].word[2 * step], x.group[n].word[2 * step + 1]};
          mma_16816(d[m][n], a, b, T{});
        }
      }
    }
  }

  // At out[token * kSumStride + row].
  __device__ void store(float* out) const {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          out[(n * 8 + 2 * t + i % 2) * kSumStride + m * 16 + i / 2 * 8 + g] = d[m][n][i];
        }
      }
    }
  }
};

// Adds the sums of the warps that share rows, in their order, and hands them to put(row, token).
template <int kGroups, typename Put>
__device__ inline void add_warps(const float* sums, int row_tiles, int warps, int tokens,
                                 Put put) {
  for (int i = int(threadIdx.x); i < tokens * row_tiles * kTileRows; i += int(blockDim.x)) {
    const int row = i % (row_tiles * kTileRows), token = i / (row_tiles * kTileRows);
    const float* from = sums + row / kTileRows * sum_floats(kGroups) + token * kSumStride +
                        row % kTileRows;
    float sum = 0.f;
    for (int warp = 0; warp < warps; warp += row_tiles) sum += from[warp * sum_floats(kGroups)];
    put(row, token, sum);
  }
}

// Grid (blocks of row_tiles * 32 rows, splits of K).
template <typename T, int kGroups>
__global__ void __launch_bounds__(kGroups > 4 ? 256 : 512, 1) bitmap_product(BitmapCall<T> call) {
  LW_DYNAMIC_SHARED(shared);
  const BitmapPlan& plan = call.plan;
  const BitmapLane lane;
  const int warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
  const int row_tile = int(blockIdx.x) * plan.row_tiles + warp % plan.row_tiles;
  const int stride = warps / plan.row_tiles;  // warps that share out these rows' tiles
  const int first = int(blockIdx.y) * plan.per_split + warp / plan.row_tiles;
  const int last = min((int(blockIdx.y) + 1) * plan.per_split, plan.along);
  const int end = row_tile < plan.down ? last : first;
  const int row_start = row_tile * plan.along;

  const uint32_t slot_size = uint32_t(slot_bytes(call.tiles.most));
  const uint32_t base = window_address(shared);
  const uint32_t slots = base + uint32_t(warp * plan.stages) * slot_size;
  const uint32_t map =
      base + uint32_t(warps * plan.stages) * slot_size + uint32_t(warp * kMapBytes);
  TileFetch ahead(call.tiles);
  {
    // All places first: each is a wait for memory.
    TileFetch slot_of[kMostStages] = {ahead, ahead, ahead};
#pragma unroll
    for (int s = 0; s < kMostStages; ++s) {
      const int tile = first + s * stride;
      if (s < plan.stages && tile < end) slot_of[s].locate(row_start + tile);
    }
#pragma unroll
    for (int s = 0; s < kMostStages; ++s) {
      if (s < plan.stages && first + s * stride < end) {
        slot_of[s].fetch(slots + uint32_t(s) * slot_size);
      }
      if (s < plan.stages) cp_async_commit();
    }
  }
  TokenRows<T, kGroups> tokens(call);
  TokenColumns<kGroups> x, next;
  if (first < end) {
    tokens.move_to(first);
    tokens.load(0, next);
  }

  Sums<kGroups> sums;
  uint32_t slot = slots;
#pragma unroll 1
  for (int tile = first; tile < end; tile += stride) {
    const bool more = tile + plan.stages * stride < end;
    if (more) ahead.locate(row_start + tile + plan.stages * stride);
    if (plan.stages == 3) {
      cp_async_wait<2>();
    } else {
      cp_async_wait<1>();
    }
    index_tile(slot, map);
    __syncwarp();
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      x = next;
      // Where there is no next tile, what is loaded is not used.
      if (pair == 3) tokens.move_to(min(tile + stride, end - 1));
      tokens.load((pair + 1) % 4, next);
      sums.template add_pair<T>(lane, map, pair, x);
    }
    // The last product had every lane's fragments: slot and map are read, and free.
    if (more) ahead.fetch(slot);
    cp_async_commit();
    slot += slot_size;
    if (slot == slots + uint32_t(plan.stages) * slot_size) slot = slots;
  }

  float* const all = reinterpret_cast<float*>(shared);
  __syncthreads();  // the sums take the place of other warps' slots
  sums.store(all + warp * sum_floats(kGroups));
  __syncthreads();
  const int64_t block_row = int64_t(blockIdx.x) * plan.row_tiles * kTileRows;
  float* const partial = call.partial + int64_t(blockIdx.y) * call.tokens * call.rows;
  add_warps<kGroups>(all, plan.row_tiles, warps, call.tokens, [&](int i, int token, float sum) {
    const int64_t r = block_row + i, at = int64_t(token) * call.rows + r;
    if (r >= call.rows) return;
    if (plan.splits > 1) {
      partial[at] = sum;
    } else {
      if (call.bias) sum += to_float(call.bias[r]);
      call.y[at] = from_float<T>(activate(sum, call.activation));
    }
  });
}

constexpr int kFinishThreads = 256;

// x [tokens, columns] of any alignment to [tokens, padded], zeros behind its columns; a thread for
// each element.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    bitmap_pad(const T* x, int64_t columns, T* out, int64_t padded, int64_t count) {
  const int64_t at = int64_t(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (at >= count) return;
  const int64_t column = at % padded;
  out[at] = column < columns ? x[at / padded * columns + column] : T{0};
}

// Adds what the splits of K left, in their order; a thread for each output.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads) bitmap_finish(BitmapCall<T> call) {
  const int64_t at = int64_t(blockIdx.x) * kFinishThreads + threadIdx.x;
  const int64_t count = call.tokens * call.rows;
  if (at >= count) return;
  float sum = 0.f;
  for (int s = 0; s < call.plan.splits; ++s) sum += call.partial[s * count + at];
  if (call.bias) sum += to_float(call.bias[at % call.rows]);
  call.y[at] = from_float<T>(activate(sum, call.activation));
}

// At least one row and one token, at most 64 tokens.
template <typename T>
void bitmap_linear(const BitmapCall<T>& call, const Launch& launch) {
  const BitmapPlan& plan = call.plan;
  const Shape shape{grid(tiles_over(plan.down, plan.row_tiles), plan.splits), plan.warps * 32,
                    plan.shared};
  switch (plan.groups) {
    case 1:
      launch(bitmap_product<T, 1>, shape, call);
      break;
    case 2:
      launch(bitmap_product<T, 2>, shape, call);
      break;
    case 4:
      launch(bitmap_product<T, 4>, shape, call);
      break;
    default:
      launch(bitmap_product<T, 8>, shape, call);
  }
  if (plan.splits > 1) {
    const int64_t blocks = tiles_over(call.tokens * call.rows, kFinishThreads);
    launch(bitmap_finish<T>, Shape{grid(blocks), kFinishThreads}, call);
  }
}

}  // namespace liveweight::cuda
