// How kernelwise_conv2d cuts a convolution into blocks: plain arithmetic, no device code.
#pragma once

#include <cstdint>
#include <utility>

#include "launch.cuh"

namespace liveweight::cuda::kernelwise {

constexpr int kFiltersPerWarp = 2;
constexpr int kQuad = 4;            // neighbouring outputs of a row that one lane owns
constexpr int kBlockBytes = 96;     // of what a block keeps about itself in shared memory
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

// All that a plan depends on. Strides in elements: (sample, channel, row, column).
struct ConvShape {
  int64_t x_stride[4], y_stride[4];
  int64_t batch;
  int64_t kept;
  int group_channels, group_filters, groups;
  int height, width;          // of x
  int out_height, out_width;  // before pooling
  int kernel[2], stride[2], padding[2], dilation[2];
  int pool;

  bool operator==(const ConvShape&) const = default;
  __host__ __device__ int pooled_height() const { return out_height / pool; }
  __host__ __device__ int pooled_width() const { return out_width / pool; }
};

// A convolution and the pictures it reads and writes. Kernel i of filter o reads channel
// channels[i] of the filter's group.
struct Conv : ConvShape {
  const float* x;       // widened where the op's x is not float, and so are the values
  const float* values;  // [kept, kh, kw]
  const int32_t* filter_offsets;
  const int32_t* channels;
  const void* bias;  // or null
  void* y;
  bool relu;
  Element element;  // of bias and y
};

// Lanes of a warp own patches of rows x 4 outputs; a warp's patches cover `images` samples of
// down x across patches each. All warps of a block have the same patches and their own filters.
//
// x is staged per channel as columns of pairs: pixel (row, column) of a sample lies at word
// column / 2 * pair_pitch + 2 * (row + gaps) + column % 2, so that the rows of a patch are
// constants away from each other. Where patches begin an even number of rows apart, a row is left
// out before each but the first: with an odd step, 8-byte loads of a half-warp can meet every bank
// once.
struct ConvTile {
  int rows;   // of a patch
  int warps;  // of a block
  int images, down, across;
  int step;         // staged rows from one patch to the next
  bool down_first;  // neighbouring lanes are neighbours in a column, else in a row
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
  // Place of a lane's patch among those of a sample.
  __host__ __device__ int patch_down(int lane) const {
    return down_first ? lane % down : lane / across % down;
  }
  __host__ __device__ int patch_across(int lane) const {
    return down_first ? lane / down % across : lane % across;
  }
  __host__ __device__ int lane_of(int image, int patch_row, int patch_column) const {
    return image * down * across +
           (down_first ? patch_column * down + patch_row : patch_row * across + patch_column);
  }
  __host__ __device__ int with_gaps(int row) const { return row + (step % 2 ? 0 : row / step); }
  __host__ __device__ int first_word(int lane, int stride) const {
    return lane / (down * across) * image_pitch + patch_down(lane) * 2 * (step + (step + 1) % 2) +
           patch_across(lane) * (kQuad * stride / 2) * pair_pitch;
  }
  int64_t blocks(int groups) const {
    return image_tiles * tiles_down * tiles_across * filter_blocks * groups;
  }
};

__host__ __device__ inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Shared-memory wavefronts that a warp's 8-byte loads need, one for each half at best.
inline int load_wavefronts(const ConvTile& t, int stride) {
  int wavefronts = 0;
  for (int half = 0; half < 2; ++half) {
    int hits[16] = {}, most = 0;
    for (int lane = 16 * half; lane < 16 * half + 16; ++lane) {
      if (lane / (t.across * t.down) >= t.images) continue;
      const int found = ++hits[t.first_word(lane, stride) / 2 % 16];
      if (found > most) most = found;
    }
    wavefronts += most;
  }
  return wavefronts;
}

// Those that 32 neighbouring columns need when they are written.
inline int store_wavefronts(const ConvTile& t) {
  int wavefronts = 1;
  while (wavefronts < 16 && t.pair_pitch % (4 * wavefronts) == 0) wavefronts *= 2;
  return wavefronts;
}

// Orders the lanes and pads the columns of pairs and the samples: few wavefronts, little room.
inline void choose_pitches(ConvTile& t, int stride) {
  ConvTile best = t;
  const int pairs = (t.staged_columns + 1) / 2, rows = t.with_gaps(t.staged_rows - 1) + 1;
  const int image_steps = t.images > 1 ? 16 : 1;
  const double least_words = double(t.images) * pairs * 2 * rows;
  double least = 1e300;
  for (int n = 0; n < 32 * image_steps; ++n) {
    t.down_first = n % 2;
    t.pair_pitch = 2 * (rows + n / 2 % 16);
    t.image_pitch = pairs * t.pair_pitch + 2 * (n / 32);
    t.channel_pitch = (t.images * t.image_pitch + 3) / 4 * 4;
    // A patch is loaded by more filters than it is stored for; room decides how many channels a
    // chunk has, hence how often the block waits for itself.
    const double score = 10 * load_wavefronts(t, stride) + 4 * store_wavefronts(t) +
                         20 * t.channel_pitch / least_words;
    if (score >= least) continue;
    least = score;
    best = t;
  }
  t = best;
}

__host__ __device__ inline int shared_before_stages(const ConvTile& t) {
  return kBlockBytes + (t.places() * 8 + t.filters() * 4 + 15) / 16 * 16;
}

// Two blocks of eight warps, or four of four, fit a multiprocessor.
inline int shared_limit(const ConvTile& t) { return kSharedLimit / 8 * t.warps; }

inline int result_bytes(const ConvTile& t) { return t.filters() * t.rows * 32 * kQuad * 4; }

// Whether two channels and all results fit whatever choose_pitches adds.
inline bool fits(const ConvTile& t) {
  const int64_t pairs = (t.staged_columns + 1) / 2;
  const int64_t channel = t.images * (pairs * 2 * (t.with_gaps(t.staged_rows) + 15) + 30) + 3;
  const int64_t most = 2 * 4 * channel > result_bytes(t) ? 2 * 4 * channel : result_bytes(t);
  return shared_before_stages(t) + most <= shared_limit(t);
}

// Fills in pitches, chunk and shared memory of a tile that fits.
inline void finish_tile(ConvTile& t, const ConvShape& c) {
  choose_pitches(t, c.stride[0]);
  const int fixed = shared_before_stages(t), channel = 2 * 4 * t.channel_pitch;
  const int most = (shared_limit(t) - fixed) / channel;
  // In even chunks: the last one should not be a small rest. Copies are unrolled.
  const int64_t whole = most > 4 ? most / 4 * 4 : most;
  t.chunk = int(divide_up(c.group_channels, divide_up(c.group_channels, whole)));
  const int stages = t.chunk * channel, results = result_bytes(t);
  t.shared = fixed + (stages > results ? stages : results);
}

// Clocks that a multiprocessor takes for the blocks that fall to it, estimated: what its four
// schedulers issue, or one warp's way through its filters where there are too few warps.
inline double tile_cost(const ConvTile& t, const ConvShape& c) {
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
  const double block = (filters * filter + c.group_channels * 6 * staged) / 4 + 1000;
  const double way = (filters > t.warps ? 2 : 1) * filter + 2000;
  const double all = block * double(divide_up(t.blocks(c.groups), kMultiprocessors));
  return all > way ? all : way;
}

// The same of the kernel whose lanes load every operand from memory by themselves.
inline double direct_cost(const ConvShape& c) {
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
inline void try_tile(const ConvShape& c, int rows, int64_t across, int warps, TileChoice& best) {
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
  t.step = rows * c.stride[0];
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
TileChoice choose_tile(const ConvShape& c) {
  TileChoice best;
  for (const int across : {1, 2, 4, 7, 8, 14, 16, 32}) {
    for (const int warps : {8, 4}) (try_tile(c, Rows, across, warps, best), ...);
  }
  if (best.cost < kNoTile) finish_tile(best.tile, c);
  return best;
}

// The same, at once for the latest shapes: choosing takes longer than a launch.
template <int... Rows>
TileChoice remember_tile(const ConvShape& c) {
  constexpr int kRemembered = 32;
  static thread_local ConvShape shapes[kRemembered];
  static thread_local TileChoice choices[kRemembered];
  static thread_local int oldest = 0;
  if (wish.way != Wish::kCheapest) return choose_tile<Rows...>(c);
  for (int i = 0; i < kRemembered; ++i) {
    if (shapes[i] == c) return choices[i];
  }
  const int at = std::exchange(oldest, (oldest + 1) % kRemembered);
  shapes[at] = c;
  return choices[at] = choose_tile<Rows...>(c);
}

}  // namespace liveweight::cuda::kernelwise
