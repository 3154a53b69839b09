// How kernelwise_conv2d cuts a convolution into blocks: plain arithmetic, no device code.
#pragma once

#include <cstdint>

#include "launch.cuh"

namespace liveweight::cuda::kernelwise {

constexpr int kFiltersPerWarp = 2;
constexpr int kQuad = 4;            // neighbouring outputs of a row that one lane owns
constexpr int64_t kMultiprocessors = 132;

enum class Element : int { kFloat, kBf16, kHalf };

// What the tests want in place of the cheapest plan (tests/cuda_host/probes.cu); 0: no wish.
struct Wish {
  enum Way : int { kCheapest, kTiled, kDirect };
  int way = kCheapest, rows = 0, warps = 0;
};
#if defined(__CUDACC__)
constexpr Wish wish;
#else
inline Wish wish;
#endif

// A convolution and the pictures it reads and writes; strides in elements, (sample, channel, row,
// column). Kernel i of filter o reads channel channels[i] of the filter's group.
struct Conv {
  const void* x;
  const float* values;  // [kept, kh, kw], widened where x is not float
  const int32_t* filter_offsets;
  const int32_t* channels;
  const void* bias;  // like x, or null
  void* y;
  int64_t x_stride[4], y_stride[4];
  int64_t batch;
  int64_t kept;
  int group_channels, group_filters, groups;
  int height, width;          // of x
  int out_height, out_width;  // before pooling
  int kernel[2], stride[2], padding[2], dilation[2];
  int pool;
  bool relu;
  Element element;

  __host__ __device__ int pooled_height() const { return out_height / pool; }
  __host__ __device__ int pooled_width() const { return out_width / pool; }
};

// Lanes of a warp own patches of rows x 4 outputs; a warp's patches cover `images` samples of
// down x across patches each. All warps of a block have the same patches and their own filters.
//
// x is staged per channel as columns of pairs: pixel (row, column) of a sample lies at word
// column / 2 * pair_pitch + 2 * row + column % 2, so that the rows of a patch are constants away
// from each other and every 8-byte load of a half-warp meets each bank once.
struct ConvTile {
  int rows;   // of a patch
  int warps;  // of a block
  int images, down, across;
  int64_t image_tiles, tiles_down, tiles_across;
  int filter_blocks;  // per group
  int staged_rows, staged_columns;
  int pair_pitch, image_pitch, channel_pitch;  // words
  int chunk;                                   // channels staged at once
  int shared;                                  // bytes
  bool direct_store;  // patches go straight from registers to y

  __host__ __device__ int filters() const { return warps * kFiltersPerWarp; }
  __host__ __device__ int places() const {
    const int staged = images * staged_rows * staged_columns;
    const int out = images * down * rows * across * kQuad;
    return staged > out ? staged : out;
  }
  int64_t blocks(int groups) const {
    return image_tiles * tiles_down * tiles_across * filter_blocks * groups;
  }
};

__host__ __device__ inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Shared-memory wavefronts that a half-warp's 8-byte loads need, summed over both halves.
inline int pair_wavefronts(const ConvTile& t, int stride) {
  int wavefronts = 0;
  for (int half = 0; half < 2; ++half) {
    int hits[16] = {}, most = 0;
    for (int lane = 16 * half; lane < 16 * half + 16; ++lane) {
      const int image = lane / (t.across * t.down);
      if (image >= t.images) continue;
      const int column = lane % t.across * kQuad * stride;
      const int row = lane / t.across % t.down * t.rows * stride;
      const int word = image * t.image_pitch + column / 2 * t.pair_pitch + 2 * row;
      const int found = ++hits[word / 2 % 16];
      if (found > most) most = found;
    }
    wavefronts += most;
  }
  return wavefronts;
}

// Pads the columns of pairs and the samples until loads meet no bank twice, as far as that goes.
inline void choose_pitches(ConvTile& t, int stride) {
  ConvTile best = t;
  int least = 1 << 30;
  const int pairs = (t.staged_columns + 1) / 2, image_steps = t.images > 1 ? 16 : 1;
  for (int more = 0; more < 16 && least > 4; ++more) {
    for (int gap = 0; gap < image_steps && least > 4; ++gap) {
      t.pair_pitch = 2 * (t.staged_rows + more);
      t.image_pitch = pairs * t.pair_pitch + 2 * gap;
      t.channel_pitch = (t.images * t.image_pitch + 3) / 4 * 4;
      // An odd number of rows also lets neighbouring columns be written at once.
      const int score = 2 * pair_wavefronts(t, stride) + (t.staged_rows + more + 1) % 2;
      if (score >= least) continue;
      least = score;
      best = t;
    }
  }
  t = best;
}

__host__ __device__ inline int shared_before_stages(const ConvTile& t) {
  return (t.places() * 8 + t.filters() * 4 + 15) / 16 * 16;
}

// Two blocks of eight warps, or four of four, fit a multiprocessor.
inline int shared_limit(const ConvTile& t) { return kSharedLimit / 8 * t.warps; }

inline int result_bytes(const ConvTile& t) { return t.filters() * t.rows * 32 * kQuad * 4; }

// Whether two channels and all results fit whatever choose_pitches adds.
inline bool fits(const ConvTile& t) {
  const int64_t pairs = (t.staged_columns + 1) / 2;
  const int64_t channel = t.images * (pairs * 2 * (t.staged_rows + 15) + 30) + 3;
  const int64_t most = 2 * 4 * channel > result_bytes(t) ? 2 * 4 * channel : result_bytes(t);
  return shared_before_stages(t) + most <= shared_limit(t);
}

// Fills in pitches, chunk and shared memory of a tile that fits.
inline void finish_tile(ConvTile& t, const Conv& c) {
  choose_pitches(t, c.stride[0]);
  const int fixed = shared_before_stages(t), channel = 2 * 4 * t.channel_pitch;
  const int most = (shared_limit(t) - fixed) / channel;
  // In even chunks: the last one should not be a small rest.
  const int64_t chunks = divide_up(c.group_channels, most);
  t.chunk = int(divide_up(c.group_channels, chunks));
  const int stages = t.chunk * channel, results = result_bytes(t);
  t.shared = fixed + (stages > results ? stages : results);
}

// Clocks that a multiprocessor takes for the blocks that fall to it, estimated: what its four
// schedulers issue, or one warp's way through its filters where there are too few warps.
inline double tile_cost(const ConvTile& t, const Conv& c) {
  const double taps = double(c.kernel[0]) * c.kernel[1];
  const double patch_rows = (t.rows - 1) * c.stride[0] + c.kernel[0];
  // A load of pairs holds the shared memory for two clocks, in which eight products can issue.
  const double loads = patch_rows * ((3 * c.stride[1] + c.kernel[1] + 1) / 2);
  const double issued = taps * t.rows * kQuad + loads + taps + 16;
  const double kernel = issued > 8 * loads ? issued : 8 * loads;
  const double filters = c.group_filters < t.filters() ? c.group_filters : t.filters();
  const double kept = double(c.kept) / (double(c.group_filters) * c.groups);
  const double filter = kernel * kept + t.rows * 20;
  const double staged = double(t.images) * t.staged_rows * t.staged_columns / 32;
  const double block = (filters * filter + c.group_channels * 3 * staged) / 4 + 1000;
  const double way = (filters > t.warps ? 2 : 1) * filter + 2000;
  const double all = block * double(divide_up(t.blocks(c.groups), kMultiprocessors));
  return all > way ? all : way;
}

// The same of the kernel whose lanes load every operand from memory by themselves.
inline double direct_cost(const Conv& c) {
  const double taps = double(c.kernel[0]) * c.kernel[1] * c.pool * c.pool;
  const double filters = double(c.group_filters) * c.groups;
  const double per_filter = double(c.kept) / filters * taps;
  const int64_t outputs = c.batch * c.pooled_height() * c.pooled_width();
  const double blocks = double(divide_up(outputs, 512)) * filters;
  const double all = blocks / kMultiprocessors * per_filter * 50 + 1000;
  const double way = per_filter * 100 + 1000;
  return all > way ? all : way;
}

constexpr double kNoTile = 1e300;

struct TileChoice {
  ConvTile tile{};
  double cost = kNoTile;
};

// Elements between the first and the last place of a tile.
inline int64_t reach(const int64_t (&stride)[4], int64_t images, int64_t rows, int64_t columns) {
  return (images - 1) * stride[0] + (rows - 1) * stride[2] + (columns - 1) * stride[3];
}

// Tries one patch height, width of the tile and number of warps; keeps the cheaper.
inline void try_tile(const Conv& c, int rows, int64_t across, int warps, TileChoice& best) {
  if ((wish.rows && rows != wish.rows) || (wish.warps && warps != wish.warps)) return;
  ConvTile t{};
  const int64_t most_down = divide_up(c.out_height, rows);
  const int64_t most_across = divide_up(c.out_width, kQuad);
  if (across > most_across) across = most_across;
  t.rows = rows, t.warps = warps, t.across = int(across);
  t.down = int(most_down < 32 / across ? most_down : 32 / across);
  const bool whole = t.down == most_down && across == most_across;
  const int64_t room = whole ? 32 / (t.down * across) : 1;
  t.images = int(c.batch < room ? c.batch : room);
  // Pooling windows must not cross tiles.
  if (t.down < most_down && t.down * rows % c.pool) return;
  if (across < most_across && across * kQuad % c.pool) return;
  t.image_tiles = divide_up(c.batch, t.images);
  t.tiles_down = divide_up(most_down, t.down), t.tiles_across = divide_up(most_across, across);
  t.filter_blocks = int(divide_up(c.group_filters, t.filters()));
  t.staged_rows = (t.down * rows - 1) * c.stride[0] + c.kernel[0];
  t.staged_columns = int(across * kQuad - 1) * c.stride[1] + c.kernel[1];
  const int64_t most = int64_t(1) << 31;
  if (t.blocks(c.groups) >= most || !fits(t)) return;
  if (reach(c.x_stride, t.images, t.staged_rows, t.staged_columns) >= most) return;
  if (reach(c.y_stride, t.images, t.down * rows, across * kQuad) >= most) return;
  const double cost = tile_cost(t, c);
  if (cost < best.cost) best = {t, cost};
}

// The cheapest tile of patches of one of these heights, finished.
template <int... Rows>
TileChoice choose_tile(const Conv& c) {
  TileChoice best;
  for (const int across : {1, 2, 4, 7, 8, 14, 16, 32}) {
    for (const int warps : {8, 4}) (try_tile(c, Rows, across, warps, best), ...);
  }
  if (best.cost < kNoTile) finish_tile(best.tile, c);
  return best;
}

}  // namespace liveweight::cuda::kernelwise
