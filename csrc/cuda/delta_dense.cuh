// Between the Delta format and dense matrices of the same 16-bit type (see delta.cuh).
//
// delta_to_dense writes W [rows, columns], zeros included: a block lays out some rows of a slice in
// shared memory, where one warp puts the entries, and stores them 16 bytes at a time. Floor: the
// write of W, 2 * rows * columns bytes / 4.3 TB/s.
// delta_gather reads a dense matrix at the kept places: the gradient of the values.
#pragma once

#include <cstdint>

#include "delta.cuh"
#include "launch.cuh"

namespace liveweight::cuda {

constexpr int kDenseThreads = 256;

// Calls put(group, entry of the group, bits, column) for the entries of one lane's stream, fillers
// included, in their order.
template <int kBits, typename Put>
__device__ inline void for_each_entry(const DeltaWeight& w, Walk& walk, Chunk<kBits>& chunk,
                                      int lane, Put put) {
  if (w.head) walk.find_tail(w, lane);
  int column = walk.start;
  for (int first = 0; walk.now > 0; first += kChunkGroups) {
#pragma unroll
    for (int g = 0; g < kChunkGroups; ++g) {
      if (g >= walk.now) break;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        column += int(chunk.template delta<0>(g * kGroup + j)) * w.classes;
        put(first + g, j, entry_bits(chunk.values[g], j), column);
      }
    }
    chunk.load(walk);
  }
}

// Stores `count` elements of shared memory, a multiple of 16 bytes long, at `out`.
__device__ inline void store_row(uint16_t* out, const uint16_t* row, int count, bool aligned) {
  if (aligned) {
    for (int i = int(threadIdx.x) * kGroup; i < count; i += kDenseThreads * kGroup) {
      *reinterpret_cast<Vector16*>(out + i) = *reinterpret_cast<const Vector16*>(row + i);
    }
  } else {
    for (int i = int(threadIdx.x); i < count; i += kDenseThreads) out[i] = row[i];
  }
}

// Grid (slices, parts). Shared: `at_once` rows of `stride` elements; aligned: rows of W begin on
// 16-byte boundaries and are a multiple of them long.
template <int kBits>
__global__ void __launch_bounds__(kDenseThreads, 2)
    expand_slices(DeltaWeight w, uint16_t* dense, int stride, int at_once, bool aligned) {
  LW_DYNAMIC_SHARED(shared);
  uint16_t* rows = reinterpret_cast<uint16_t*>(shared);
  const int lane = int(threadIdx.x) % kLaneCount;
  const int slice = int(blockIdx.y) * w.slices + int(blockIdx.x);
  const int64_t column = int64_t(blockIdx.y) * w.part;
  const int64_t rest = w.columns - column;
  const int width = int(rest < w.part ? rest : w.part);
  const int per_slice = kLaneCount / w.lanes;
  for (int first = 0; first < per_slice; first += at_once) {
    const int count = per_slice - first < at_once ? per_slice - first : at_once;
    for (int i = int(threadIdx.x) * kGroup; i < count * stride; i += kDenseThreads * kGroup) {
      *reinterpret_cast<Vector16*>(rows + i) = Vector16{};
    }
    __syncthreads();
    const int mine = lane / w.lanes - first;
    if (threadIdx.x < kLaneCount && mine >= 0 && mine < count) {
      Walk walk;
      Chunk<kBits> chunk;
      walk.open(w, slice, slice + 1, lane, chunk);
      for_each_entry(w, walk, chunk, lane, [&](int, int, uint16_t bits, int at) {
        if (bits != kFiller) rows[mine * stride + at] = bits;
      });
    }
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      const int row = w.order[int64_t(slice) * per_slice + first + i];
      if (row < 0) break;
      store_row(dense + row * w.columns + column, rows + i * stride, width, aligned);
    }
    __syncthreads();
  }
}

// values[i] = dense[row, column] of each entry, 0 for fillers of w; a warp for each slice. Grid
// (ceil(slices / warps of a block), parts).
template <int kBits>
__global__ void __launch_bounds__(kDenseThreads, 2)
    gather_slices(DeltaWeight w, const uint16_t* dense, uint16_t* values) {
  constexpr int kWarps = kDenseThreads / kLaneCount;
  const int lane = int(threadIdx.x) % kLaneCount;
  const int in_part = int(blockIdx.x) * kWarps + int(threadIdx.x) / kLaneCount;
  if (in_part >= w.slices) return;
  const int slice = int(blockIdx.y) * w.slices + in_part;
  Walk walk;
  Chunk<kBits> chunk;
  walk.open(w, slice, slice + 1, lane, chunk);
  const uint16_t* row =
      dense + (walk.row < 0 ? 0 : walk.row) * w.columns + int64_t(blockIdx.y) * w.part;
  uint16_t group[kGroup];
  for_each_entry(w, walk, chunk, lane, [&](int g, int j, uint16_t bits, int column) {
    group[j] = bits == kFiller ? 0 : row[column];
    if (j < kGroup - 1) return;
    Vector16 packed;
#pragma unroll
    for (int i = 0; i < 4; ++i) packed.word[i] = group[2 * i] | uint32_t(group[2 * i + 1]) << 16;
    const int64_t at = g < w.head ? int64_t(slice) * w.head + g : walk.group + g - w.head;
    *reinterpret_cast<Vector16*>(values + (at * kLaneCount + lane) * kGroup) = packed;
  });
}

// At least one row and one column.
inline void delta_to_dense(const DeltaWeight& w, int bits, uint16_t* dense, const Launch& launch) {
  const int64_t width = w.columns < w.part ? w.columns : w.part;
  const int stride = int(div_up(width, kGroup) * kGroup);  // at most 64 KB
  const int fitting = kSharedLimit / 2 / stride;
  const int at_once = fitting < kLaneCount / w.lanes ? fitting : kLaneCount / w.lanes;
  const bool aligned =
      reinterpret_cast<uintptr_t>(dense) % 16 == 0 && w.columns % kGroup == 0;
  with_bits(bits, [&](auto b) {
    launch(expand_slices<decltype(b)::value>,
           Shape{grid(w.slices, w.parts), kDenseThreads, at_once * stride * 2}, w, dense, stride,
           at_once, aligned);
  });
}

inline void delta_gather(const DeltaWeight& w, int bits, const uint16_t* dense, uint16_t* values,
                         const Launch& launch) {
  constexpr int kWarps = kDenseThreads / kLaneCount;
  with_bits(bits, [&](auto b) {
    launch(gather_slices<decltype(b)::value>,
           Shape{grid(div_up(w.slices, kWarps), w.parts), kDenseThreads}, w, dense, values);
  });
}

}  // namespace liveweight::cuda
