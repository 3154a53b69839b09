// The Delta format on the GPU: where a weight's parts lie, and how a lane walks along its stream.
//
// formats/delta.py has the layout. A slice is what one warp reads: 32 streams side by side, in
// groups of 8 entries. Lane l finds the 16 bytes of its g-th group at values[(g * 32 + l) * 8] and
// the bits of its deltas in words l, 32 + l, 64 + l, ...: all loads of a warp are contiguous.
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
  const int32_t* offsets;   // [slices + 1, 2]: first group, and first row of 32 words of deltas
  int64_t rows, columns;
  int lanes;                // streams per row, a power of two
  int part, parts;
  int slices;               // of one part
};

// The position of a lane: what of its stream is still to be loaded.
struct Walk {
  const uint16_t* values;
  const uint32_t* deltas;
  int left;   // groups
  int start;  // column of the first entry, within its part
  int row;    // -1: none

  // `slice` counts through all parts; any slice from `end` on is empty.
  __device__ void open(const DeltaWeight& w, int slice, int end, int lane) {
    values = w.values;
    deltas = w.deltas;
    left = start = 0;
    row = -1;
    if (slice >= end) return;
    const int group = w.offsets[2 * slice], word = w.offsets[2 * slice + 1];
    left = w.offsets[2 * slice + 2] - group;
    values += (int64_t(group) * kLaneCount + lane) * kGroup;
    deltas += int64_t(word) * kLaneCount + lane;
    start = w.starts[int64_t(slice) * kLaneCount + lane];
    row = w.order[int64_t(slice) * (kLaneCount / w.lanes) + lane / w.lanes];
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
    load_deltas(walk, g);
  }
  __device__ void load_deltas(const Walk& walk, int g) {
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
