// Between formats/bitmap.py and dense matrices of the same 16-bit type: one warp for each tile.
//
// Floor of bitmap_expand on an H200: what it reads and writes, 2.125 + 2 * density bytes a weight
// at 4.3 TB/s.
#pragma once

#include "bitmap_plan.cuh"
#include "bitmap_tile.cuh"
#include "launch.cuh"

namespace liveweight::cuda {

constexpr int kDenseWarps = 4;

struct BitmapShape {
  int64_t rows, columns;
  int down, along;  // tiles

  BitmapShape(int64_t n, int64_t k)
      : rows(n),
        columns(k),
        down(int(tiles_over(n, kTileRows))),
        along(int(tiles_over(k, kTileColumns))) {}

  // Whether 16 bytes of a row can go at once; the matrix is torch's own.
  __host__ __device__ bool wide() const { return columns % 8 == 0; }
};

// Calls visit(row, column, pair, m, half) where this lane has 8 columns of a row of the tile.
template <typename Visit>
__device__ inline void for_each_share(const BitmapShape& shape, int tile, Visit visit) {
  const int64_t row = int64_t(tile / shape.along) * kTileRows + lane_id() / 4;
  const int64_t column = int64_t(tile % shape.along) * kTileColumns + lane_id() % 4 * 8;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        visit(row + m * 16 + half * 8, column + pair * 32, pair, m, half);
      }
    }
  }
}

// dense[row, column] = W. Grid (ceil(tiles / 4)).
__global__ void __launch_bounds__(kDenseWarps * 32)
    bitmap_expand(BitmapTiles tiles, BitmapShape shape, uint16_t* dense) {
  LW_DYNAMIC_SHARED(shared);
  const int warp = int(threadIdx.x) / 32;
  const int tile = int(blockIdx.x) * kDenseWarps + warp;
  if (tile >= shape.down * shape.along) return;
  const int bytes = slot_bytes(tiles.most) + kMapBytes;
  const uint32_t slot = window_address(shared) + uint32_t(warp * bytes);
  const uint32_t map = slot + uint32_t(slot_bytes(tiles.most));
  TileFetch copy(tiles);
  copy.locate(tile);
  copy.fetch(slot);
  cp_async_commit();
  cp_async_wait<0>();
  index_tile(slot, map);
  __syncwarp();
  const BitmapLane lane;
  for_each_share(shape, tile, [&](int64_t row, int64_t column, int pair, int m, int half) {
    Vector16 eight;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t word, place;
      load_window(map + lane.list + map_entry(pair, step, m, half), word, place);
      decode(lane, word, place, eight.word[2 * step], eight.word[2 * step + 1]);
    }
    if (row >= shape.rows || column >= shape.columns) return;
    uint16_t* const to = dense + row * shape.columns + column;
    if (shape.wide()) {
      *reinterpret_cast<Vector16*>(to) = eight;
    } else {
      const int left = int(min(shape.columns - column, int64_t(8)));
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < left) to[i] = uint16_t(eight.word[i / 2] >> i % 2 * 16);
      }
    }
  });
}

// The tile whose values a warp writes: bits and map like those of a tile that is read, and room for
// the values, which leave together.
struct TileOut {
  uint32_t slot, map, limit;
  int start, parts;
  unsigned char* own;  // slot_bytes(most) + kMapBytes

  __device__ TileOut(const BitmapTiles& tiles, int tile, unsigned char* memory)
      : slot(window_address(memory)),
        map(slot + uint32_t(slot_bytes(tiles.most))),
        start(tiles.offsets[tile]),
        parts(min(tiles.offsets[tile + 1] - start, tiles.most)),
        own(memory) {
    limit = slot + kBitBytes + uint32_t(parts) * 16;
    reinterpret_cast<Vector16*>(own)[lane_id()] = *reinterpret_cast<const Vector16*>(
        tiles.bits + int64_t(tile) * kTileWords + lane_id() * 4);
    if (lane_id() == 0 && parts > 0) values()[parts - 1] = Vector16{};
    index_tile(slot, map);
    __syncwarp();
  }

  __device__ Vector16* values() const { return reinterpret_cast<Vector16*>(own + kBitBytes); }

  // Takes this lane's 8 columns of a row of W where they are kept.
  __device__ void keep(const BitmapLane& lane, int pair, int m, int half,
                       const Vector16& eight) const {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t word, place;
      load_window(map + lane.list + map_entry(pair, step, m, half), word, place);
      const uint32_t mine = word >> lane.shift & 0x01010101u;
      uint32_t at = place + 2 * uint32_t(popc(word & lane.through_first)) - 2 * (mine & 1u);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!(mine >> 8 * i & 1u) || at >= limit) continue;
        store_window_half(at, eight.word[step * 2 + i / 2] >> i % 2 * 16);
        at += 2;
      }
    }
  }

  __device__ void write(uint16_t* out) const {
    __syncwarp();
    Vector16* const to = reinterpret_cast<Vector16*>(out + int64_t(start) * kPartValues);
    for (int i = lane_id(); i < parts; i += 32) to[i] = values()[i];
  }
};

// values = dense where W is kept, in its order, zeros behind the last of a tile. Grid as above.
__global__ void __launch_bounds__(kDenseWarps * 32)
    bitmap_gather(BitmapTiles tiles, BitmapShape shape, const uint16_t* dense, uint16_t* values) {
  LW_DYNAMIC_SHARED(shared);
  const int warp = int(threadIdx.x) / 32;
  const int tile = int(blockIdx.x) * kDenseWarps + warp;
  if (tile >= shape.down * shape.along) return;
  const TileOut out(tiles, tile, shared + warp * (slot_bytes(tiles.most) + kMapBytes));
  const BitmapLane lane;
  for_each_share(shape, tile, [&](int64_t row, int64_t column, int pair, int m, int half) {
    Vector16 eight{};
    if (row < shape.rows && column < shape.columns) {
      const uint16_t* const from = dense + row * shape.columns + column;
      const int left = int(min(shape.columns - column, int64_t(8)));
      if (shape.wide()) {
        eight = load_streaming(from);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (i < left) eight.word[i / 2] |= uint32_t(from[i]) << i % 2 * 16;
        }
      }
    }
    out.keep(lane, pair, m, half, eight);
  });
  out.write(values);
}

inline Shape dense_shape(const BitmapTiles& tiles, const BitmapShape& shape) {
  return Shape{grid(tiles_over(int64_t(shape.down) * shape.along, kDenseWarps)), kDenseWarps * 32,
               kDenseWarps * (slot_bytes(tiles.most) + kMapBytes)};
}

}  // namespace liveweight::cuda
