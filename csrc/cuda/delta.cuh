// The Delta format on the GPU: where a weight's parts lie, and how a lane walks along its stream.
//
// formats/delta.py has the layout. A slice is what one warp reads: 32 streams side by side, in
// groups of 8 entries. Lane l finds the 16 bytes of its g-th group at values[(g * 32 + l) * 8] and
// the bits of its deltas in words l, 32 + l, 64 + l, ...: all loads of a warp are contiguous. The
// first four groups of all slices (heads) may lie before all the rest (tails), where the number of
// a slice alone says: their loads do not wait for those of the offsets.
#pragma once

#include <cstdint>
#include <type_traits>

#include "ptx_shared.cuh"

namespace liveweight::cuda {

constexpr int kLaneCount = 32;
constexpr int kGroup = 8;            // entries of a lane in one 16-byte load
constexpr int kChunkGroups = 4;      // groups that a lane loads at once: 32 entries, kBits words
constexpr uint16_t kFiller = 0x8000;  // -0.0 marks an entry that stands for no weight

constexpr int kMultiprocessors = 132;  // of an H200; the plan does not depend on the device

inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One weight [rows, columns], cut into `parts` ranges of `part` columns.
struct DeltaWeight {
  const uint16_t* values;
  const uint32_t* deltas;
  const int16_t* starts;    // [slices, 32]: column of a stream's first entry, within its part
  const int32_t* order;     // [slices, 32 / lanes]: row of each place, -1 where there is none
  const int32_t* offsets;   // [slices + 1, 2]: of each tail, first group and first row of 32 words
  int64_t rows, columns;
  int lanes;                // streams per row, a power of two
  int part, parts;
  int head;                 // groups: 0 or 4
  int classes;              // of columns, 1 or 8: what a delta of 1 is
  int slices;               // of one part
};

template <int kBits>
struct Chunk;

// The position of a lane in its stream: `now` groups are in registers (more than 4: the first 4),
// `left` groups lie behind them at `values` and `deltas`.
struct Walk {
  const uint16_t* values = nullptr;
  const uint32_t* deltas = nullptr;
  int now = 0, left = 0;
  int start = 0;  // column of the first entry, within its part
  int row = -1;   // -1: none
  int group = 0, word = 0, end = 0;  // of the tail, as `offsets` has them

  // Issues the first loads of a slice and waits for none; `slice` counts through all parts, and
  // slices from `behind` on are empty. Heads lie where the number of the slice says.
  template <int kBits>
  __device__ void open(const DeltaWeight& w, int slice, int behind, int lane, Chunk<kBits>& chunk) {
    now = left = start = 0;
    row = -1;
    if (slice >= behind) return;
    if (w.head) {
      values = w.values + (int64_t(slice) * kChunkGroups * kLaneCount + lane) * kGroup;
      deltas = w.deltas + int64_t(slice) * kBits * kLaneCount + lane;
      left = kChunkGroups;
      chunk.load(*this);
    }
    group = w.offsets[2 * slice];
    word = w.offsets[2 * slice + 1];
    end = w.offsets[2 * slice + 2];
    start = w.starts[int64_t(slice) * kLaneCount + lane];
    row = w.order[int64_t(slice) * (kLaneCount / w.lanes) + lane / w.lanes];
    if (!w.head) {
      find_tail(w, lane);
      chunk.load(*this);
    }
  }
  // With heads, to be called before the walk goes on: here it waits for the offsets.
  __device__ void find_tail(const DeltaWeight& w, int lane) {
    values = w.values + (int64_t(group) * kLaneCount + lane) * kGroup;
    deltas = w.deltas + int64_t(word) * kLaneCount + lane;
    left = end - group;
  }
};

// Up to 32 entries of a lane, in registers: a window on its stream. Each group is loaded again as
// soon as it has been used, so three of four groups are always under way.
template <int kBits>
struct Chunk {
  Vector16 values[kChunkGroups];
  uint32_t deltas[kBits];

  // Issues the loads of group g and of the words whose last bits belong to it; what lies behind the
  // stream's end is not read.
  __device__ void load(const Walk& walk, int g) {
    if (g < walk.left) values[g] = load_streaming(walk.values + g * kLaneCount * kGroup);
#pragma unroll
    for (int i = 0; i < kBits; ++i) {
      const bool here = 32 * i + 31 < (g + 1) * kGroup * kBits && 32 * i + 31 >= g * kGroup * kBits;
      if (here && 32 * i < walk.left * kGroup * kBits) {
        deltas[i] = load_word(walk.deltas + i * kLaneCount);
      }
    }
  }
  __device__ void load(Walk& walk) {
#pragma unroll
    for (int g = 0; g < kChunkGroups; ++g) load(walk, g);
    step(walk);
  }
  __device__ static void step(Walk& walk) {
    walk.values += kChunkGroups * kLaneCount * kGroup;
    walk.deltas += kBits * kLaneCount;
    walk.now = walk.left;
    walk.left -= kChunkGroups;
  }

  // The i-th delta times 2^kScale. Masked where it stands and then moved, so that the addition to
  // a column can take the shift along (LEA): two instructions for each entry.
  template <int kScale>
  __device__ uint32_t delta(int i) const {
    constexpr uint32_t kMask = (1u << kBits) - 1u;
    const int word = i * kBits / 32, at = i * kBits % 32;
    if (at + kBits > 32) {
      return (funnel_shift(deltas[word], deltas[word + 1], at) & kMask) << kScale;
    }
    const uint32_t field = deltas[word] & kMask << at;
    return at >= kScale ? field >> (at - kScale) : field << (kScale - at);
  }
};

// Entry j of a group: its 16 bits.
__device__ inline uint16_t entry_bits(const Vector16& group, int j) {
  return uint16_t(group.word[j / 2] >> (j % 2 * 16));
}

// Calls body(std::integral_constant<int, bits>) for the bits that kernels know.
template <typename Body>
void with_bits(int bits, Body body) {
  if (bits == 4) body(std::integral_constant<int, 4>());
  if (bits == 5) body(std::integral_constant<int, 5>());
  if (bits == 6) body(std::integral_constant<int, 6>());
  if (bits == 8) body(std::integral_constant<int, 8>());
}

}  // namespace liveweight::cuda
