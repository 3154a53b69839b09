// y = act(x W^T + bias), W 2:4 (formats.SemiStructured), at most 64 tokens, on sparse tensor cores.
//
// W is the first operand of mma.sp.m16n8k32, x the second, eight tokens to an instruction; what
// tokens beyond the last give is never stored. A lane loads its operands and index pairs of W as
// 16 and 8 bytes straight into registers, two tiles of 16 x 128 ahead. x goes through shared memory
// by cp.async, a phase of columns ahead, and from there by ldmatrix. Warps beside each other add
// up their columns through shared memory, blocks (splits) through a workspace and a second launch,
// both in fixed order.
//
// Floor: one read of W, 1.125 bytes for each of its N K weights, at 4.3 TB/s (H200): 4.4 us for
// 4096 x 4096, 15.4 us for 14336 x 4096; a dense product reads 2 bytes, 1.78 times as much. In
// flight: up to two tiles of 2.3 KB for each warp and tile row, so 37 or 74 KB a block.
// Instructions: an mma.sp, its ldmatrix and its load serve 512 weights; see EXPECTED of
// tests/kernels/code_semi_structured_linear.py for what was compiled.
#pragma once

#include "activation.cuh"
#include "launch.cuh"
#include "ptx_copy.cuh"
#include "ptx_matrix.cuh"
#include "semi_structured_plan.cuh"

namespace liveweight::cuda::two_of_four {

template <typename T>
struct FewTokens {
  const T* x;  // [tokens, columns]: every row begins on a 16-byte boundary
  const Vector16* values;
  const unsigned char* meta;
  const T* bias;     // [rows] or null
  T* y;              // token m, row n: y[m * y_token + n * y_row]
  float* partials;   // [splits, tokens, rows], or null where there is one split
  int tokens, columns;  // K: a multiple of 8
  int64_t rows;         // N
  int64_t tile_rows;    // R
  int tile_columns;     // U
  int per_split;        // tile columns of a split
  int64_t y_token, y_row;
  int activation;
};

struct SparseTile {
  Vector16 value[kTileSteps];
  Vector8 meta;
};

__device__ inline void load_tile(SparseTile& tile, const Vector16* values,
                                 const unsigned char* meta, int64_t index) {
  const int lane = lane_id();
#pragma unroll
  for (int s = 0; s < kTileSteps; ++s) {
    tile.value[s] = load_streaming(values + (index * kTileSteps + s) * 32 + lane);
  }
  tile.meta = load_streaming8(meta + index * kTileMetaBytes + lane * 8);
}

// Copies columns first to first + kColumns of all tokens, as far as `end`; zeros from K on. A thread
// keeps to 8 columns and walks down the tokens.
template <typename C, typename T>
__device__ inline void stage_tokens(const FewTokens<T>& in, unsigned char* to, int first, int end) {
  constexpr int kPieces = C::kColumns / 8, kStep = kFewThreads / kPieces;
  const int piece = int(threadIdx.x) % kPieces, column = first + 8 * piece;
  if (column >= end) return;
  const bool inside = column < in.columns;
  const int64_t step = inside ? int64_t(kStep) * in.columns : 0;
  int token = int(threadIdx.x) / kPieces;
  const T* from = in.x + (inside ? int64_t(token) * in.columns + column : 0);
  to += token * C::kPitch + 16 * piece;
#pragma unroll 4
  for (; token < in.tokens; token += kStep, from += step, to += kStep * C::kPitch) {
    cp_async16(to, from, inside);
  }
}

// One step of 32 columns: kStep picks its operands and, by selector and word, its index pairs.
template <int kStep, typename C, typename T>
__device__ inline void multiply_step(const SparseTile (&tile)[C::kRowTiles],
                                     const unsigned char* tokens,
                                     float (&sum)[C::kRowTiles][C::kGroups][4]) {
#pragma unroll
  for (int g = 0; g < C::kGroups; ++g) {
    uint32_t b[4];
    ldmatrix_x4(b, tokens + g * 8 * C::kPitch + kStep * 64);
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) {
      mma_sp_16832<kStep % 2>(sum[r][g], tile[r].value[kStep].word, b,
                              tile[r].meta.word[kStep / 2], T{});
    }
  }
}

template <typename C, typename T>
__device__ inline void multiply_tile(const SparseTile (&tile)[C::kRowTiles],
                                     const unsigned char* tokens,
                                     float (&sum)[C::kRowTiles][C::kGroups][4]) {
  multiply_step<0, C, T>(tile, tokens, sum);
  multiply_step<1, C, T>(tile, tokens, sum);
  multiply_step<2, C, T>(tile, tokens, sum);
  multiply_step<3, C, T>(tile, tokens, sum);
}

template <typename T>
__device__ inline void finish(const FewTokens<T>& in, int token, int64_t row, float sum) {
  if (in.bias != nullptr) sum += to_float(in.bias[row]);
  in.y[token * in.y_token + row * in.y_row] = from_float<T>(activate(sum, in.activation));
}

// Adds the warps' sums up and stores them. The shared memory is the block's, free to write.
template <typename C, typename T>
__device__ inline void store_sums(const FewTokens<T>& in, float* shared, int row_warp, int depth,
                                  const float (&sum)[C::kRowTiles][C::kGroups][4]) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int r = 0; r < C::kRowTiles; ++r) {
#pragma unroll
    for (int group = 0; group < C::kGroups; ++group) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = (row_warp * C::kRowTiles + r) * kTileRows + g + 8 * half;
        float* to = shared + (depth * C::kRows + row) * C::kSumPitch + 8 * group + 2 * t;
        const float* from = sum[r][group] + 2 * half;
        *reinterpret_cast<float2*>(to) = make_float2(from[0], from[1]);
      }
    }
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < C::kRows * in.tokens; i += kFewThreads) {
    const int row = i % C::kRows, token = i / C::kRows;
    const int64_t n = int64_t(blockIdx.x) * C::kRows + row;
    if (n >= in.rows) continue;
    float total = 0;
#pragma unroll
    for (int d = 0; d < C::kDepthWarps; ++d) {
      total += shared[(d * C::kRows + row) * C::kSumPitch + token];
    }
    if (in.partials == nullptr) {
      finish(in, token, n, total);
    } else {
      in.partials[(int64_t(blockIdx.y) * in.tokens + token) * in.rows + n] = total;
    }
  }
}

// What a warp does: tiles depth, depth + kDepthWarps, ... of its split, in one or two tile rows.
template <typename C, typename T>
struct FewWork {
  const FewTokens<T>& in;
  unsigned char* shared;
  int row_warp, depth;
  int first, tiles, phases;  // tile columns of the split
  int64_t start[C::kRowTiles];

  __device__ FewWork(const FewTokens<T>& in, unsigned char* shared) : in(in), shared(shared) {
    const int warp = int(threadIdx.x) / 32;
    row_warp = warp % C::kRowWarps;
    depth = warp / C::kRowWarps;
    first = int(blockIdx.y) * in.per_split;
    const int left = in.tile_columns - first;
    tiles = left < in.per_split ? left : in.per_split;
    phases = (tiles + C::kDepthWarps - 1) / C::kDepthWarps;
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) {
      int64_t row = (int64_t(blockIdx.x) * C::kRowWarps + row_warp) * C::kRowTiles + r;
      // Rows beyond the last tile repeat it; nothing of theirs is stored.
      row = row < in.tile_rows ? row : in.tile_rows - 1;
      start[r] = row * in.tile_columns + (first + depth);
    }
  }

  __device__ bool has(int phase) const { return depth + phase * C::kDepthWarps < tiles; }

  __device__ void load(int phase, SparseTile (&to)[C::kRowTiles]) const {
    if (!has(phase)) return;
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) {
      load_tile(to[r], in.values, in.meta, start[r] + phase * C::kDepthWarps);
    }
  }

  __device__ unsigned char* stage_of(int phase) const {
    return shared + phase % 2 * C::kStageBytes;
  }

  __device__ void stage(int phase) const {
    const int from = first + phase * C::kDepthWarps;
    stage_tokens<C>(in, stage_of(phase), from * kTileColumns, (first + tiles) * kTileColumns);
    cp_async_commit();
  }

  // Multiplies a tile and has its registers filled again: two phases ahead all the time.
  __device__ void run(int phase, SparseTile (&tile)[C::kRowTiles],
                      float (&sum)[C::kRowTiles][C::kGroups][4]) const {
    cp_async_wait<0>();
    __syncthreads();  // all have this phase's x, and are done with the other buffer
    if (phase + 1 < phases) stage(phase + 1);
    if (!has(phase)) return;
    // This lane's row of the four matrices of ldmatrix: token lane % 8, 8 columns each.
    const int lane = lane_id();
    const int mine = lane % 8 * C::kPitch + depth * kTileColumns * 2 + lane / 8 * 16;
    multiply_tile<C, T>(tile, stage_of(phase) + mine, sum);
    load(phase + 2, tile);
  }
};

// Grid (row blocks, splits).
template <typename C, typename T>
__global__ void __launch_bounds__(kFewThreads, C::kGroups <= 2 ? 2 : 1)
    multiply_few_tokens(FewTokens<T> in) {
  LW_DYNAMIC_SHARED(shared);
  const FewWork<C, T> work(in, shared);
  float sum[C::kRowTiles][C::kGroups][4] = {};
  SparseTile even[C::kRowTiles], odd[C::kRowTiles];
  work.load(0, even);
  work.load(1, odd);
  work.stage(0);
  for (int phase = 0; phase < work.phases; phase += 2) {
    work.run(phase, even, sum);
    if (phase + 1 < work.phases) work.run(phase + 1, odd, sum);
  }
  __syncthreads();
  store_sums<C>(in, reinterpret_cast<float*>(shared), work.row_warp, work.depth, sum);
}

// Adds the splits up, first to last; none where W has no columns.
template <typename T>
__global__ void __launch_bounds__(kFewThreads) finish_few_tokens(FewTokens<T> in, int splits) {
  const int64_t total = int64_t(in.tokens) * in.rows;
  const int64_t step = int64_t(gridDim.x) * kFewThreads;
  for (int64_t i = int64_t(blockIdx.x) * kFewThreads + threadIdx.x; i < total; i += step) {
    float sum = 0;
    for (int s = 0; s < splits; ++s) sum += in.partials[s * total + i];
    finish(in, int(i / in.rows), i % in.rows, sum);
  }
}

// x [tokens, columns] -> [tokens, padded], padded a multiple of 8 elements, zeros at the end.
template <typename T>
__global__ void __launch_bounds__(kFewThreads)
    align_rows(const T* x, int64_t tokens, int64_t columns, int64_t padded, T* out) {
  const int64_t step = int64_t(gridDim.x) * kFewThreads;
  int64_t i = int64_t(blockIdx.x) * kFewThreads + threadIdx.x;
  for (; i < tokens * padded; i += step) {
    const int64_t column = i % padded;
    out[i] = column < columns ? x[i / padded * columns + column] : T{0};
  }
}

inline Shape few_elements(int64_t count) {
  const int64_t blocks = divide_up(count, kFewThreads);
  return {grid(blocks < 1056 ? blocks : 1056), kFewThreads};
}

// At most kPassTokens tokens. partials holds plan.splits * tokens * rows floats if splits > 1.
template <typename T>
void semi_structured_few(FewTokens<T> in, const FewPlan& plan, const Launch& launch) {
  const auto start = [&](auto config) {
    using C = decltype(config);
    static_assert(C::kShared <= kSharedLimit);
    launch(multiply_few_tokens<C, T>,
           Shape{grid(plan.row_blocks, plan.splits), kFewThreads, C::kShared}, in);
  };
  if (plan.splits > 0) {
    if (plan.groups == 1 && plan.row_tiles == 1) start(FewConfig<1, 1, 1>{});
    if (plan.groups == 1 && plan.row_tiles == 2) start(FewConfig<1, 2, 1>{});
    if (plan.groups == 2) start(FewConfig<2, 2, 1>{});
    if (plan.groups == 4) start(FewConfig<4, 2, 2>{});
    if (plan.groups == 8) start(FewConfig<8, 2, 4>{});
  }
  if (plan.splits != 1) {
    launch(finish_few_tokens<T>, few_elements(in.tokens * in.rows), in, plan.splits);
  }
}

}  // namespace liveweight::cuda::two_of_four
