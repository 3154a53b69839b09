// How bitmap_linear cuts its work into blocks: plain arithmetic, no device code.
#pragma once

#include <cstdint>

#include "bitmap_tile.cuh"

namespace liveweight::cuda {

constexpr int kMostTokens = 64;
constexpr int kMostStages = 3;
constexpr int kSumStride = kTileRows + 4;  // between tokens: lanes that store meet no bank twice

// Floats of the sums of one warp.
constexpr int sum_floats(int groups) { return groups * 8 * kSumStride; }

struct BitmapPlan {
  int groups;     // of 8 tokens: 1, 2, 4 or 8
  int row_tiles;  // rows of tiles of a block
  int warps;      // of a block; warps / row_tiles share out K
  int stages;     // slots of a warp
  int splits;     // blocks that share out K
  int per_split;  // tiles along K of a split
  int down;       // rows of tiles of W
  int along;      // tiles of a row
  int shared;     // bytes
};

struct Gpu {
  int multiprocessors;
  int shared;  // bytes that a block may have
};

inline int64_t tiles_over(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

inline int bitmap_shared(const BitmapPlan& plan, int most) {
  const int tiles = plan.warps * (plan.stages * slot_bytes(most) + kMapBytes);
  const int sums = plan.warps * sum_floats(plan.groups) * int(sizeof(float));
  return tiles > sums ? tiles : sums;
}

// `most`: parts of the fullest tile.
inline BitmapPlan bitmap_plan(int tokens, int64_t rows, int64_t columns, int most, Gpu gpu) {
  BitmapPlan plan{};
  plan.groups = tokens <= 8 ? 1 : tokens <= 16 ? 2 : tokens <= 32 ? 4 : 8;
  plan.down = int(tiles_over(rows, kTileRows));
  plan.along = int(tiles_over(columns, kTileColumns));
  // Warps with other rows and the same columns share their reads of x in the first-level cache.
  plan.row_tiles = plan.groups == 1 ? 1 : plan.groups == 2 ? 2 : 4;
  while (plan.row_tiles > 1 && plan.row_tiles / 2 >= plan.down) plan.row_tiles /= 2;
  const int blocks = int(tiles_over(plan.down, plan.row_tiles));

  // Where rows are too few to fill the GPU, blocks share out K, with at least two tiles a warp.
  plan.warps = 8;
  const int at_least = 2 * plan.warps / plan.row_tiles;
  int splits = gpu.multiprocessors / blocks;
  if (splits > plan.along / at_least) splits = plan.along / at_least;
  if (splits < 1) splits = 1;
  plan.per_split = int(tiles_over(plan.along > 1 ? plan.along : 1, splits));
  plan.splits = int(tiles_over(plan.along > 1 ? plan.along : 1, plan.per_split));

  // Sixteen warps a multiprocessor hide latencies: in one block if there is one, else in two.
  plan.stages = kMostStages;
  const auto fits = [&](int bytes) { return bitmap_shared(plan, most) <= bytes; };
  if (plan.groups < 8 && blocks * plan.splits <= gpu.multiprocessors) {
    plan.warps = 16;
    if (!fits(gpu.shared)) plan.stages = 2;
    if (!fits(gpu.shared)) plan.warps = 8;
  } else if (plan.groups < 8 && !fits(gpu.shared / 2)) {
    plan.stages = 2;
  }
  if (!fits(gpu.shared)) plan.stages = 2;
  while (!fits(gpu.shared) && plan.warps > plan.row_tiles) plan.warps /= 2;
  plan.shared = bitmap_shared(plan, most);
  return plan;
}

}  // namespace liveweight::cuda
