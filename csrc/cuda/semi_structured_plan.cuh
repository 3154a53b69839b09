// How semi_structured_linear cuts its work into blocks: plain arithmetic, no device code.
#pragma once

#include <cstdint>

#include "semi_structured.cuh"

namespace liveweight::cuda::two_of_four {

constexpr int kFewThreads = 256;
constexpr int kFewWarps = kFewThreads / 32;
constexpr int kPassTokens = 64;
constexpr int kMostSplits = 16;

// A block: kRowWarps warps stand below each other, each with kRowTiles tiles of 16 rows;
// kDepthWarps beside each other share the columns of a phase, 128 each. Eight tokens a group.
template <int kGroups_, int kRowTiles_, int kRowWarps_>
struct FewConfig {
  static constexpr int kGroups = kGroups_, kRowTiles = kRowTiles_, kRowWarps = kRowWarps_;
  static constexpr int kDepthWarps = kFewWarps / kRowWarps;
  static constexpr int kRows = kTileRows * kRowTiles * kRowWarps;
  static constexpr int kColumns = kTileColumns * kDepthWarps;  // of one phase
  // Bytes of a token's columns in shared memory. 16 more, so that the eight rows that ldmatrix
  // reads at once lie in different banks.
  static constexpr int kPitch = 2 * kColumns + 16;
  static constexpr int kStageBytes = 8 * kGroups * kPitch;
  // Floats of a row's sums: 8 modulo 32, so that the four rows of a half-warp do not collide.
  static constexpr int kSumPitch = kGroups == 1 ? 8 : 8 * kGroups + 8;
  static constexpr int kSumBytes = 4 * kDepthWarps * kRows * kSumPitch;
  static constexpr int kShared = 2 * kStageBytes > kSumBytes ? 2 * kStageBytes : kSumBytes;
};

struct FewPlan {
  int groups, row_tiles, row_warps;
  int64_t row_blocks;  // grid.x
  int splits;          // grid.y; 0: there are no columns
  int64_t per_split;   // tile columns of one split
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Picks, by the bytes that the busiest of 132 multiprocessors moves, among the compiled blocks and
// among splits of the columns. x comes from L2 and counts half; a second launch for the sums of
// the splits costs 2 us, in which a multiprocessor would have moved 64 KB. Shapes alone decide.
inline FewPlan plan_few_tokens(int64_t tokens, int64_t rows, int64_t columns) {
  constexpr int64_t kMultiprocessors = 132, kSecondLaunch = 64 << 10;
  const int64_t U = divide_up(columns, kTileColumns);
  FewPlan best{};
  int64_t least = INT64_MAX;
  for (const int row_tiles : {2, 1}) {
    FewPlan plan{};
    plan.groups = tokens <= 8 ? 1 : tokens <= 16 ? 2 : tokens <= 32 ? 4 : 8;
    plan.row_warps = plan.groups <= 2 ? 1 : plan.groups / 2;
    plan.row_tiles = row_tiles;
    if (row_tiles == 1 && plan.groups > 1) continue;
    const int64_t block_rows = int64_t(kTileRows) * row_tiles * plan.row_warps;
    const int64_t depth = kFewWarps / plan.row_warps;
    plan.row_blocks = divide_up(rows, block_rows);
    for (int64_t wanted = 1; wanted <= kMostSplits; ++wanted) {
      plan.per_split = divide_up(divide_up(U, wanted), depth) * depth;
      plan.splits = int(U == 0 ? 0 : divide_up(U, plan.per_split));
      const int64_t tiles = plan.per_split < U ? plan.per_split : U;
      const int64_t weights = tiles * (kTileBytes + kTileMetaBytes) * block_rows / kTileRows;
      const int64_t block = weights + tiles * kTileColumns * tokens;
      int64_t cost = divide_up(plan.row_blocks * plan.splits, kMultiprocessors) * block;
      if (plan.splits > 1) {
        cost += kSecondLaunch + 8 * plan.splits * tokens * rows / kMultiprocessors;
      }
      if (cost < least) {
        least = cost;
        best = plan;
      }
    }
  }
  return best;
}

}  // namespace liveweight::cuda::two_of_four
