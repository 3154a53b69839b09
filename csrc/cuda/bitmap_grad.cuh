// The gradient of the values of formats/bitmap.py for few tokens: G^T x where W is kept, without
// that product as a whole in memory.
//
// A block has 4 rows of tiles and one column of them; it keeps x of its 128 columns in shared
// memory, each warp the G of its 32 rows, with tokens as the inner dimension of the matrix
// instruction. A warp multiplies 32 columns at a time, rounds them, and picks what is kept. Floor
// on an H200: 2 * density + 1/8 bytes a weight at 4.3 TB/s.
#pragma once

#include "bitmap_dense.cuh"
#include "bitmap_plan.cuh"
#include "ptx_matrix.cuh"

namespace liveweight::cuda {

constexpr int kXStride = (kTileColumns + 8) * 2;  // bytes of a token: rows of 8 x 8 matrices meet
constexpr int kGradStride = (kTileRows + 8) * 2;  // no bank twice
constexpr int kProductStride = (32 + 8) * 2;
constexpr int kProductBytes = kTileRows * kProductStride;

template <typename T>
struct BitmapGradCall {
  BitmapTiles tiles;
  BitmapShape shape;
  const T* grad;  // [tokens, rows]
  const T* x;     // [tokens, columns]
  T* values;
  int tokens;
  int steps;  // of 16 tokens
  bool wide;  // x goes by 16 bytes
};

constexpr int grad_warp_bytes(int most, int steps) {
  return slot_bytes(most) + kMapBytes + kProductBytes + steps * 16 * kGradStride;
}

// x of this block's columns, zeros for tokens and columns that there are not.
template <typename T>
__device__ inline void stage_x(const BitmapGradCall<T>& call, unsigned char* to) {
  const int64_t first = int64_t(blockIdx.x) * kTileColumns;
  const int step = call.wide ? 8 : 1;
  for (int i = int(threadIdx.x) * step; i < call.steps * 16 * kTileColumns;
       i += kDenseWarps * 32 * step) {
    const int token = i / kTileColumns, column = i % kTileColumns;
    const bool inside = token < call.tokens && first + column < call.shape.columns;
    const T* const from = call.x + token * call.shape.columns + first + column;
    unsigned char* const at = to + token * kXStride + column * 2;
    if (call.wide) {
      *reinterpret_cast<Vector16*>(at) = inside ? load_cached(from) : Vector16{};
    } else {
      *reinterpret_cast<T*>(at) = inside ? *from : T{0};
    }
  }
}

// The product of 32 rows and 32 columns, rounded, at `out`.
template <typename T>
__device__ inline void multiply_pair(const BitmapGradCall<T>& call, const unsigned char* grad,
                                     const unsigned char* x, unsigned char* out) {
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  float d[2][4][4] = {};
  for (int step = 0; step < call.steps; ++step) {
    // Matrices 0 to 3 of ldmatrix, transposed: (tokens, rows) in A, (tokens, columns) in B.
    const int token = step * 16 + lane % 8;
    uint32_t a[2][4], b[4][2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      ldmatrix_x4_trans(a[m], grad + (token + lane / 16 * 8) * kGradStride +
                                  (m * 16 + lane / 8 % 2 * 8) * 2);
    }
#pragma unroll
    for (int two = 0; two < 2; ++two) {
      uint32_t r[4];
      ldmatrix_x4_trans(
          r, x + (token + lane / 8 % 2 * 8) * kXStride + (two * 16 + lane / 16 * 8) * 2);
      b[2 * two][0] = r[0], b[2 * two][1] = r[1];
      b[2 * two + 1][0] = r[2], b[2 * two + 1][1] = r[3];
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) mma_16816(d[m][n], a[m], b[n], T{});
    }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<uint32_t*>(out + (m * 16 + half * 8 + g) * kProductStride +
                                     (n * 8 + 2 * t) * 2) =
            pack2(d[m][n][2 * half], d[m][n][2 * half + 1], T{});
      }
    }
  }
}

// Grid (tiles along K, ceil(tiles down / 4)).
template <typename T>
__global__ void __launch_bounds__(kDenseWarps * 32) bitmap_sample(BitmapGradCall<T> call) {
  LW_DYNAMIC_SHARED(shared);
  stage_x(call, shared);
  const int warp = int(threadIdx.x) / 32;
  const int down = int(blockIdx.y) * kDenseWarps + warp;
  unsigned char* const own = shared + call.steps * 16 * kXStride +
                             warp * grad_warp_bytes(call.tiles.most, call.steps);
  unsigned char* const product = own + slot_bytes(call.tiles.most) + kMapBytes;
  unsigned char* const grad = product + kProductBytes;
  const int64_t row = int64_t(down) * kTileRows + lane_id();
  for (int token = 0; token < call.steps * 16; ++token) {
    const bool inside = token < call.tokens && row < call.shape.rows;
    reinterpret_cast<T*>(grad + token * kGradStride)[lane_id()] =
        inside ? call.grad[token * call.shape.rows + row] : T{0};
  }
  __syncthreads();
  if (down >= call.shape.down) return;
  const TileOut out(call.tiles, down * call.shape.along + int(blockIdx.x), own);
  const BitmapLane lane;
  for (int pair = 0; pair < 4; ++pair) {
    multiply_pair(call, grad, shared + pair * 64, product);
    __syncwarp();
#pragma unroll
    for (int rows = 0; rows < 4; ++rows) {
      const unsigned char* const from =
          product + (rows * 8 + lane_id() / 4) * kProductStride + lane_id() % 4 * 16;
      out.keep(lane, pair, rows / 2, rows % 2, *reinterpret_cast<const Vector16*>(from));
    }
    // The next product begins with loads of all lanes together: it comes after these reads.
  }
  out.write(reinterpret_cast<uint16_t*>(call.values));
}

// At least one tile, at most 64 tokens.
template <typename T>
void bitmap_grad_values(const BitmapGradCall<T>& call, const Launch& launch) {
  const int bytes = call.steps * 16 * kXStride +
                    kDenseWarps * grad_warp_bytes(call.tiles.most, call.steps);
  launch(bitmap_sample<T>,
         Shape{grid(call.shape.along, tiles_over(call.shape.down, kDenseWarps)), kDenseWarps * 32,
               bytes},
         call);
}

}  // namespace liveweight::cuda
