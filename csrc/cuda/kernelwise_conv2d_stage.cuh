// What a block of conv_tile works on, and how its part of x comes to shared memory.
#pragma once

#include "kernelwise_conv2d_plan.cuh"
#include "launch.cuh"
#include "ptx_copy.cuh"

namespace liveweight::cuda::kernelwise {

// A place of the tile in memory, counted from the tile's first one, and in shared memory.
struct Place {
  int memory, shared;
};

struct alignas(8) Pair {
  float value[2];
};
struct alignas(16) Quad {
  float value[kQuad];
};

// What a block works on, the same for all its threads: in shared memory, since registers are short.
struct Block {
  int first_filter, filters;
  int row, column;                            // of the first output, before pooling
  int64_t image;
  int images;
  int top, left, rows, columns;  // of the tile's part of x that lies inside the picture
  int skipped_rows, skipped_columns;          // padding before that part
  int64_t start;                              // of that part in x, in elements
};
static_assert(sizeof(Block) <= kBlockBytes);

__device__ inline int least(int64_t a, int64_t b) { return int(a < b ? a : b); }

__device__ inline Block find_block(const Conv& c, const ConvTile& t, int stride) {
  Block b;
  const int per_tile = t.filter_blocks * c.groups;
  const int part = int(blockIdx.x % per_tile), group = part / t.filter_blocks;
  int tile = int(blockIdx.x / per_tile);
  const int first = part % t.filter_blocks * t.filters();
  b.first_filter = group * c.group_filters + first;
  b.filters = least(t.filters(), c.group_filters - first);
  b.column = int(tile % t.tiles_across) * t.across * kQuad;
  tile /= int(t.tiles_across);
  b.row = int(tile % t.tiles_down) * t.down * t.rows;
  b.image = int64_t(tile / int(t.tiles_down)) * t.images;
  b.images = least(t.images, c.batch - b.image);
  const int top = b.row * stride - c.padding[0], left = b.column * stride - c.padding[1];
  b.skipped_rows = top < 0 ? -top : 0;
  b.skipped_columns = left < 0 ? -left : 0;
  b.top = top + b.skipped_rows, b.left = left + b.skipped_columns;
  b.rows = least(t.staged_rows - b.skipped_rows, c.height - b.top);
  b.columns = least(t.staged_columns - b.skipped_columns, c.width - b.left);
  if (b.rows < 0) b.rows = 0;
  if (b.columns < 0) b.columns = 0;
  b.start = b.image * c.x_stride[0] + int64_t(group) * c.group_channels * c.x_stride[1] +
            b.top * c.x_stride[2] + b.left * c.x_stride[3];
  return b;
}

// Calls visit(n, image, row, column) for this thread's share of images x rows x columns places:
// samples vary fastest where they lie side by side, else columns.
template <typename Visit>
__device__ inline void each_place(int images, int rows, int columns, bool side_by_side,
                                  Visit visit) {
  const int count = images * rows * columns;
#pragma unroll 1
  for (int n = int(threadIdx.x); n < count; n += int(blockDim.x)) {
    int at = n, image = 0;
    if (side_by_side) image = at % images, at /= images;
    const int column = at % columns;
    at /= columns;
    visit(n, side_by_side ? image : at / rows, at % rows, column);
  }
}

// Where each pixel inside the picture comes from and goes to, for a channel.
__device__ inline void list_pixels(const Conv& c, const ConvTile& t, const Block& b,
                                   Place* places) {
  const auto list = [&](int n, int i, int row, int column) {
    places[n].memory = int(i * c.x_stride[0] + row * c.x_stride[2] + column * c.x_stride[3]);
    row = t.with_gaps(row + b.skipped_rows), column += b.skipped_columns;
    places[n].shared = i * t.image_pitch + column / 2 * t.pair_pitch + 2 * row + column % 2;
  };
  each_place(b.images, b.rows, b.columns, c.x_stride[0] == 1, list);
}

// Deals the filters to warps: the heaviest and the lightest to the first, and so on.
__device__ inline void deal_filters(const Conv& c, const Block& b, int* dealt) {
  const int me = int(threadIdx.x);
  if (me >= b.filters) return;
  const int32_t* offsets = c.filter_offsets + b.first_filter;
  const int mine = offsets[me + 1] - offsets[me];
  int rank = 0;
#pragma unroll 1
  for (int other = 0; other < b.filters; ++other) {
    const int kernels = offsets[other + 1] - offsets[other];
    rank += kernels > mine || (kernels == mine && other < me);
  }
  dealt[rank] = me;
}

// Starts the copies of `channels` channels of x. Where channels lie side by side, so do the
// threads: eight channels are a sector.
__device__ inline void stage(const Conv& c, const ConvTile& t, const Block& b, const Place* places,
                             int first, int channels, float* to) {
  const int side_by_side = c.x_stride[1] == 1 && c.x_stride[3] != 1 ? 8 : 1;
  const int lane = int(threadIdx.x) % side_by_side;
  const int count = b.images * b.rows * b.columns;
  const int64_t step = c.x_stride[1] * side_by_side;
  const int pitch = t.channel_pitch * side_by_side * int(sizeof(float));
  const int mine = (channels - lane + side_by_side - 1) / side_by_side;
  const int64_t start = b.start + (first + lane) * c.x_stride[1];
  to += lane * t.channel_pitch;
#pragma unroll 1
  for (int n = int(threadIdx.x) / side_by_side; n < count; n += int(blockDim.x) / side_by_side) {
    const Place place = places[n];
    const float* from = c.x + start + place.memory;
    SharedAddress at = shared_address(to + place.shared);
#pragma unroll 8
    for (int channel = 0; channel < mine; ++channel, from += step, at += pitch) {
      cp_async4(at, from);
    }
  }
}

}  // namespace liveweight::cuda::kernelwise
