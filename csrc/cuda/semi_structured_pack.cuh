// 2:4 weights between their dense form and formats.SemiStructured: pack, to_dense, take.
//
// One warp takes a tile of 16 x 128 at a time: lane 4 g + t moves, of each of four steps, two
// groups of four columns in two rows, 8 bytes each in the dense weight (rows of 64 bytes, whole
// sectors) and 16 bytes together in the packed one. Where rows do not begin on 8-byte boundaries,
// and at ragged ends, elements are moved one by one.
//
// Floor: one pass over both, bytes / 4.3 TB/s on an H200: 2 + 1.125 bytes for each weight, e.g.
// 12.2 us for 4096 x 4096.
#pragma once

#include <type_traits>

#include "semi_structured.cuh"

namespace liveweight::cuda::two_of_four {

constexpr int kPackThreads = 256;
constexpr uint16_t kFiller = 0x8000;  // -0.0 in bf16 and fp16

struct DenseShape {
  int64_t rows, columns;  // N, K
  int64_t tile_columns;   // U
  int64_t tiles;          // R U
  bool aligned;           // every row begins on an 8-byte boundary
};

// Four neighbours in a row, as 16-bit words; 0 outside the matrix.
struct Group {
  uint16_t word[4];
};

// kWhole: the group lies inside the matrix, on an 8-byte boundary.
template <bool kWhole>
__device__ inline Group load_group(const uint16_t* dense, const DenseShape& shape, int64_t row,
                                   int64_t column) {
  const uint16_t* from = dense + row * shape.columns + column;
  if constexpr (kWhole) {
    const uint2 both = *reinterpret_cast<const uint2*>(from);
    return {uint16_t(both.x), uint16_t(both.x >> 16), uint16_t(both.y), uint16_t(both.y >> 16)};
  } else {
    Group group{};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row < shape.rows && column + i < shape.columns) group.word[i] = from[i];
    }
    return group;
  }
}

template <bool kWhole>
__device__ inline void store_group(uint16_t* dense, const DenseShape& shape, int64_t row,
                                   int64_t column, const Group& group) {
  uint16_t* to = dense + row * shape.columns + column;
  if constexpr (kWhole) {
    *reinterpret_cast<uint2*>(to) = make_uint2(group.word[0] | uint32_t(group.word[1]) << 16,
                                               group.word[2] | uint32_t(group.word[3]) << 16);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row < shape.rows && column + i < shape.columns) to[i] = group.word[i];
    }
  }
}

// Bit i: column i of the group is kept: not zero (of either sign), or set in the mask if there is
// one. A mask is bytes, 0 or 1.
template <bool kWhole>
__device__ inline uint32_t kept_bits(const Group& group, const uint8_t* mask,
                                     const DenseShape& shape, int64_t row, int64_t column) {
  uint32_t bits = 0;
  if (mask == nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= uint32_t((group.word[i] & 0x7fffu) != 0) << i;
    return bits;
  }
  mask += row * shape.columns + column;
  if constexpr (kWhole) {
    // The upper byte of the product is the sum of byte i times 2^i.
    return *reinterpret_cast<const uint32_t*>(mask) * 0x01020408u >> 24;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row < shape.rows && column + i < shape.columns) bits |= uint32_t(mask[i] != 0) << i;
    }
    return bits;
  }
}

// The two entries that a code names, side by side. Chosen by comparisons: an index into registers
// that is not known to the compiler would put them into local memory.
__device__ inline uint32_t pick(const Group& group, uint32_t column) {
  const uint32_t low = column & 1u ? group.word[1] : group.word[0];
  const uint32_t high = column & 1u ? group.word[3] : group.word[2];
  return column & 2u ? high : low;
}

__device__ inline uint32_t pick_pair(const Group& group, uint32_t code) {
  return pick(group, code & 3u) | pick(group, code >> 2) << 16;
}

// The inverse: the entries at their columns, zeros between them and for fillers.
__device__ inline Group spread_pair(uint32_t pair, uint32_t code) {
  const uint32_t first = pair & 0xffffu, second = pair >> 16;
  const uint64_t low = uint64_t(first == kFiller ? 0 : first) << 16 * (code & 3u);
  const uint64_t both = low | uint64_t(second == kFiller ? 0 : second) << 16 * (code >> 2);
  return {uint16_t(both), uint16_t(both >> 16), uint16_t(both >> 32), uint16_t(both >> 48)};
}

// Kept zeros as +0, what is not kept as fillers.
__device__ inline void clean(Group& group, uint32_t bits) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if ((group.word[i] & 0x7fffu) == 0) group.word[i] = 0;
    if ((bits >> i & 1u) == 0) group.word[i] = kFiller;
  }
}

// A tile: where it is, and whether all its groups can be moved whole.
struct TilePlace {
  int64_t index, row, column;
  bool whole;
};

__device__ inline TilePlace tile_place(int64_t index, const DenseShape& shape) {
  TilePlace tile{index, index / shape.tile_columns * kTileRows,
                 index % shape.tile_columns * kTileColumns, shape.aligned};
  tile.whole = tile.whole && tile.row + kTileRows <= shape.rows &&
               tile.column + kTileColumns <= shape.columns;
  return tile;
}

// Calls body(tile) for this warp's tiles.
template <typename Body>
__device__ inline void each_tile(const DenseShape& shape, Body body) {
  const int64_t warps = int64_t(gridDim.x) * (kPackThreads / 32);
  int64_t tile = int64_t(blockIdx.x) * (kPackThreads / 32) + threadIdx.x / 32;
  for (; tile < shape.tiles; tile += warps) body(tile_place(tile, shape));
}

struct PackOperands {
  const uint16_t* dense;
  const uint8_t* mask;  // or null
  DenseShape shape;
  Vector16* values;
  Vector8* meta;
  int* crowded;
};

// Steps 2 kWord and 2 kWord + 1, whose codes are word kWord. Of a step, q = 2 h + r: columns
// 16 h + 4 t to 16 h + 4 t + 3 of row g + 8 r. Returns whether a group keeps more than two.
template <bool kWhole, int kWord>
__device__ inline bool pack_steps(const PackOperands& out, const TilePlace& tile,
                                  uint32_t& word) {
  const int lane = lane_id(), t = lane % 4;
  const int64_t row = tile.row + lane / 4, column = tile.column + 64 * kWord + 4 * t;
  bool wrong = false;
  Group group[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    group[i] = load_group<kWhole>(out.dense, out.shape, row + 8 * (i % 2), column + 16 * (i / 2));
  }
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    Vector16 pairs;
    uint32_t nibbles[2] = {0, 0};  // of h = 0, 1: those of this lane, at their bits
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      Group& g = group[4 * s + q];
      const uint32_t bits = kept_bits<kWhole>(g, out.mask, out.shape, row + 8 * (q % 2),
                                              column + 32 * s + 16 * (q / 2));
      const uint32_t code = pair_code(bits);
      wrong = wrong || code == 0;
      clean(g, bits);
      pairs.word[q] = pick_pair(g, code);
      nibbles[q / 2] |= code << (16 * (q % 2) + 4 * t);
    }
    out.values[(tile.index * kTileSteps + 2 * kWord + s) * 32 + lane] = pairs;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      nibbles[h] |= shfl_xor(nibbles[h], 1);
      nibbles[h] |= shfl_xor(nibbles[h], 2);
      if (t == 2 * s + h) word = nibbles[h];
    }
  }
  return wrong;
}

template <bool kWhole>
__device__ inline bool pack_tile(const PackOperands& out, const TilePlace& tile) {
  Vector8 words{};
  const bool first = pack_steps<kWhole, 0>(out, tile, words.word[0]);
  const bool second = pack_steps<kWhole, 1>(out, tile, words.word[1]);
  out.meta[tile.index * 32 + lane_id()] = words;
  return first || second;
}

// crowded[0] becomes 1 where a group keeps more than two: every thread that writes writes the same.
static __global__ void __launch_bounds__(kPackThreads) pack_semi_structured(PackOperands out) {
  bool wrong = false;
  each_tile(out.shape, [&](const TilePlace& tile) {
    wrong |= tile.whole ? pack_tile<true>(out, tile) : pack_tile<false>(out, tile);
  });
  if (wrong) *out.crowded = 1;
}

// The code of columns 16 h + 4 t to 16 h + 4 t + 3 of row g + 8 r of a step, out of lane
// 4 g + 2 (step % 2) + h.
__device__ inline uint32_t read_code(const Vector8& words, int step, int h, int r) {
  const int lane = lane_id();
  const uint32_t word = shfl(words.word[step / 2], (lane & ~3) + 2 * (step % 2) + h);
  return word >> (16 * r + lane % 4 * 4) & 15u;
}

template <bool kTake>
struct MoveOperands {
  std::conditional_t<kTake, const uint16_t, uint16_t>* dense;
  DenseShape shape;
  std::conditional_t<kTake, Vector16, const Vector16>* values;
  const Vector8* meta;
};

template <bool kTake, bool kWhole>
__device__ inline void move_tile(const MoveOperands<kTake>& in, const TilePlace& tile) {
  const int lane = lane_id();
  const int64_t row = tile.row + lane / 4, column = tile.column + lane % 4 * 4;
  const int64_t packed = tile.index * kTileSteps * 32 + lane;
  const Vector8 words = in.meta[tile.index * 32 + lane];
  Vector16 pairs[kTileSteps];
  Group group[kTileSteps][4];
#pragma unroll
  for (int i = 0; i < 4 * kTileSteps; ++i) {
    if constexpr (kTake) {
      group[i / 4][i % 4] = load_group<kWhole>(in.dense, in.shape, row + 8 * (i % 2),
                                               column + 16 * (i / 2));
    } else if (i % 4 == 0) {
      pairs[i / 4] = in.values[packed + i / 4 * 32];
    }
  }
#pragma unroll
  for (int i = 0; i < 4 * kTileSteps; ++i) {
    const int step = i / 4, q = i % 4;
    const uint32_t code = read_code(words, step, q / 2, q % 2);
    if constexpr (kTake) {
      pairs[step].word[q] = pick_pair(group[step][q], code);
      if (q == 3) in.values[packed + step * 32] = pairs[step];
    } else {
      store_group<kWhole>(in.dense, in.shape, row + 8 * (i % 2), column + 16 * (i / 2),
                          spread_pair(pairs[step].word[q], code));
    }
  }
}

// kTake: dense -> values at the places of meta. Else: values -> dense, zeros elsewhere.
template <bool kTake>
__global__ void __launch_bounds__(kPackThreads) move_semi_structured(MoveOperands<kTake> in) {
  each_tile(in.shape, [&](const TilePlace& tile) {
    if (tile.whole) {
      move_tile<kTake, true>(in, tile);
    } else {
      move_tile<kTake, false>(in, tile);
    }
  });
}

}  // namespace liveweight::cuda::two_of_four
