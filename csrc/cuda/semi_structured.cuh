// The layout of formats.SemiStructured: the sizes of its tiles and the codes of its index pairs.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace liveweight::cuda::two_of_four {

constexpr int kTileRows = 16;
constexpr int kTileColumns = 128;
constexpr int kTileSteps = 4;      // mma.sp.m16n8k32 steps of 32 columns
constexpr int kStepBytes = 512;    // values of one step: 16 for each lane
constexpr int kTileBytes = kTileSteps * kStepBytes;
constexpr int kTileMetaBytes = 256;  // 8 for each lane

// Index pair of a group of four by its mask, four bits each: CODES of formats/semi_structured.py.
constexpr uint64_t kPairCodes = 0x000e0dcc09884444ull;

__host__ __device__ inline uint32_t pair_code(uint32_t mask) {
  return uint32_t(kPairCodes >> (4 * mask)) & 15u;
}

}  // namespace liveweight::cuda::two_of_four
