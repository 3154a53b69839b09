// How activity_stats cuts its work into blocks: plain arithmetic, no device code.
#pragma once

#include <cstdint>

namespace liveweight::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kInFlight = 4;       // independent loads per thread before their first use
constexpr int kWindow = 32;        // terms added in float before a flush to double
constexpr int kTargetBlocks = 528;  // four per multiprocessor of an H200: enough loads in flight
constexpr int kMaxSplits = 65535;  // grid.y
constexpr int kStats = 4;

struct Extent {
  int64_t rows;      // N
  int64_t features;  // F
  int64_t run;       // P: consecutive elements of one feature in one row
};

// How an extent is cut into blocks. In `columns`, a thread owns `vector` neighbouring columns of
// x seen as [rows, width] and walks down the rows. In `runs`, `group` threads own one feature and
// walk along its runs in 16-byte slots. Short runs take the columns way: stage two folds them.
struct Plan {
  bool columns;
  int vector;           // elements per load
  int across;           // columns: threads beside each other, a power of two
  int group;            // runs: threads per feature, 32 or 256
  int64_t width;        // columns of the partials: features * fold
  int64_t fold;         // columns of the partials that make one feature
  int64_t tiles;        // grid.x
  int64_t splits;       // grid.y
  int64_t per_split;    // rows (columns) or slots (runs) of one split
  int64_t slots;        // runs: 16-byte slots that can hold a part of one run
  bool aligned;         // runs: every run begins and ends on a 16-byte boundary
  bool one_launch;      // stage one adds straight into stats
};

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `least`: the least work of a split. Twice as much is not split yet, because the blocks of one
// split are done with it before a second launch would be.
inline void cut(Plan& plan, int64_t work, int64_t least, int64_t blocks) {
  int64_t splits = ceil_div(blocks, plan.tiles);
  if (splits > ceil_div(work, least)) splits = ceil_div(work, least);
  if (work <= 2 * least) splits = 1;
  if (splits > kMaxSplits) splits = kMaxSplits;
  if (splits < 1) splits = 1;
  plan.per_split = ceil_div(work, splits);
  plan.splits = ceil_div(work, plan.per_split);
  plan.one_launch = plan.splits == 1 && plan.fold == 1;
}

// `misalignment`: bytes by which x is off a 16-byte boundary.
inline Plan make_plan(Extent e, int element_bytes, int misalignment) {
  Plan plan{};
  const int wide = 16 / element_bytes;
  plan.columns = e.run == 1 || e.run * element_bytes < 64;
  if (plan.columns) {
    plan.fold = e.run;
    plan.width = e.features * e.run;
    plan.vector = misalignment == 0 && plan.width % wide == 0 ? wide : 1;
    plan.across = 1;
    while (plan.across < kWarp && plan.across * plan.vector < plan.width) plan.across *= 2;
    plan.tiles = ceil_div(plan.width, plan.across * plan.vector);
    cut(plan, e.rows, 8 * (kThreads / plan.across), kTargetBlocks);
  } else {
    plan.fold = 1;
    plan.width = e.features;
    plan.vector = wide;
    plan.aligned = misalignment == 0 && e.run % wide == 0;
    plan.slots = plan.aligned ? e.run / wide : (e.run + 2 * wide - 2) / wide;
    const int64_t work = e.rows * plan.slots;
    plan.group = work < 8 * kThreads ? kWarp : kThreads;
    plan.tiles = ceil_div(e.features, kThreads / plan.group);
    // A split costs 32 bytes a feature here, so there can be more of them, to even out the tail.
    cut(plan, work, 8 * plan.group, 4 * kTargetBlocks);
  }
  return plan;
}

}  // namespace liveweight::cuda
