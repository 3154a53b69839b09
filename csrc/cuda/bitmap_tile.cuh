// A tile of formats/bitmap.py in shared memory: fetched, indexed and decoded by one warp.
//
// A tile has 32 x 128 weights: 32 half fragments h = ((pair * 2 + step) * 2 + m) * 2 + half of 128
// weights, four for each lane. Lane 4 g + t has row 16 m + 8 half + g, columns 32 pair + 8 t +
// 4 step + i. Word 4 h + q of its bits has bit 8 i + l where lane 8 q + l keeps weight i. Values
// follow each other by h, lane, i.
//
// Decoding a half fragment, instructions a lane and four weights: which values are mine (and, popc,
// mad: the count below my weight 1), my bits as bytes (shift, and), where my weights 2 and 3 begin
// (dp4a), four loads, two selectors (dp2a), two prmt that put values or zeros in their halves: 14.
// Lanes read neighbouring halfwords, so no bank is asked twice while 64 values make a half fragment
// or fewer.
#pragma once

#include <cstdint>

#include "ptx.cuh"
#include "ptx_dot.cuh"
#include "shared_window.cuh"

namespace liveweight::cuda {

constexpr int kTileRows = 32;
constexpr int kTileColumns = 128;
constexpr int kTileWords = 128;
constexpr int kHalves = 32;
constexpr int kPartValues = 8;  // values of 16 bytes, the unit of offsets
constexpr int kBitBytes = kTileWords * 4;
// What lies behind a tile's values may be read (and is never used): at most one value.
constexpr int kSlotSlack = 16;
// The map says for each word where its values begin. Four lists of 32 pairs (word, place), which
// lanes 0-7, 8-15, ... read at once: their distance keeps them in different banks.
constexpr int kListBytes = kHalves * 8 + 16;
constexpr int kMapBytes = 4 * kListBytes;

constexpr int kAtOnce = 4;  // copies that a lane starts together

constexpr int slot_bytes(int most) { return kBitBytes + most * 16 + kSlotSlack; }

struct BitmapTiles {
  const uint16_t* values;
  const uint32_t* bits;
  const int32_t* offsets;
  int most;  // parts of the fullest tile
};

// One lane's share of the copies of tiles to shared memory.
class TileFetch {
 public:
  __device__ explicit TileFetch(const BitmapTiles& tiles)
      : values_(tiles.values + lane_id() * kPartValues),
        bits_(tiles.bits + lane_id() * 4),
        offsets_(tiles.offsets),
        most_(tiles.most) {}

  // Loads what says where the tile is. Long before fetch(), which waits for it.
  __device__ void locate(int tile) {
    tile_ = tile;
    start_ = offsets_[tile];
    end_ = offsets_[tile + 1];
  }

  // Starts the copy to the slot at this address; the caller commits.
  __device__ void fetch(uint32_t slot) const {
    const int lane = lane_id();
    uint32_t to = slot + uint32_t(lane) * 16;
    cp_async_window(to, bits_ + int64_t(tile_) * kTileWords);
    const uint16_t* from = values_ + int64_t(start_) * kPartValues;
    int left = min(end_ - start_, most_) - lane;  // whatever offsets say, stay in the slot
    to += kBitBytes;
#pragma unroll 1
    for (; left > 0; left -= kAtOnce * 32) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (left > i * 32) cp_async_window(to + i * 512, from + i * 32 * kPartValues);
      }
      to += kAtOnce * 512;
      from += kAtOnce * 32 * kPartValues;
    }
  }

 private:
  const uint16_t* values_;
  const uint32_t* bits_;
  const int32_t* offsets_;
  int most_, tile_ = 0, start_ = 0, end_ = 0;
};

// Writes the map of the tile in the slot: lane h has half fragment h. It reads the words that it
// copied itself, so it can begin when its own copies have come; a __syncwarp() must follow before
// the map and the values that other lanes copied are read.
__device__ inline void index_tile(uint32_t slot, uint32_t map) {
  const int lane = lane_id();
  const Vector16 words = load_window(slot + uint32_t(lane) * 16);
  uint32_t count[4], total = 0;
#pragma unroll
  for (int q = 0; q < 4; ++q) total += count[q] = uint32_t(popc(words.word[q]));
  uint32_t place = slot + kBitBytes + 2 * (running_sum(total) - total);
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    store_window(map + uint32_t(lane) * 8 + q * kListBytes, words.word[q], place);
    place += 2 * count[q];
  }
}

// Where a list of the map has a half fragment.
__device__ constexpr uint32_t map_entry(int pair, int step, int m, int half) {
  return uint32_t(((pair * 2 + step) * 2 + m) * 2 + half) * 8;
}

// What a lane knows of its place in the words; made once a kernel.
struct BitmapLane {
  uint32_t through_first;  // bits of the lanes below, and of this lane's weight 0
  uint32_t shift;
  uint32_t list;  // offset of the lane's list in a map

  __device__ BitmapLane() {
    const uint32_t lane = uint32_t(lane_id());
    shift = lane % 8;
    through_first = ((1u << shift) - 1u) * 0x01010101u | 1u << shift;
    list = lane / 8 * kListBytes;
  }
};

// The lane's four weights of a half fragment: (0, 1) in low, (2, 3) in high, zeros where pruned.
__device__ inline void decode(const BitmapLane& lane, uint32_t word, uint32_t place, uint32_t& low,
                              uint32_t& high) {
  // Weight 1's value, if any, is at `first`; weight 0's, if any, right before. The same for
  // weights 3 and 2 at `second`.
  const uint32_t first = place + 2 * uint32_t(popc(word & lane.through_first));
  const uint32_t mine = word >> lane.shift & 0x01010101u;
  const uint32_t second = dot4(mine, 0x00020200u, first);
  // The loads widen with zeros: 0x76 and 0x32 select those, 0x54 and 0x10 the value.
  constexpr uint32_t kNone = 0x7632u, kKept = uint32_t(-0x22 & 0xffff) | uint32_t(-0x2200) << 16;
  low = prmt(load_window_half(first - 2), load_window_half(first), dot2_low(kKept, mine, kNone));
  high = prmt(load_window_half(second - 2), load_window_half(second),
              dot2_high(kKept, mine, kNone));
}

// The fragment of 16 x 16 weights that two halves make (see ptx_matrix.cuh).
__device__ inline void decode_fragment(const BitmapLane& lane, uint32_t map, int pair, int step,
                                       int m, uint32_t (&a)[4]) {
  const Vector16 v = load_window(map + lane.list + map_entry(pair, step, m, 0));
  decode(lane, v.word[0], v.word[1], a[0], a[2]);
  decode(lane, v.word[2], v.word[3], a[1], a[3]);
}

}  // namespace liveweight::cuda
