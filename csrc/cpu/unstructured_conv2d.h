// Convolution with single entries of the weight missing: the engine of unstructured_conv2d and of its
// gradient to x.
//
// Outputs are dealt to the lanes of a vector as blocks: lane (s, i, j) computes, for sample s, block
// (i, j) of the output plane. With 16 lanes that is 16 samples, or 4 x 4 blocks of one sample, or
// anything between. Inputs are packed alike, each lane with the margin that its block needs:
//   packed[channel][row][phase][column][lane]
// where phase p of stride s holds the columns p, p + s, ... Then every tap of every output reads one
// aligned vector at a fixed offset, whatever padding, stride and dilation are, and neighbouring
// outputs read neighbouring vectors. The weight comes in tiles (formats.UnstructuredKernels): a tile of
// channels stays in the first-level cache while all filters of a block use it.
#pragma once

#include "dispatch.h"
#include "lanes.h"

namespace liveweight {

constexpr int kTileOutputs = 16;   // vectors of sums held in registers, at most
constexpr int kExactOutputs = 8;   // the same where sums are of products that no filter shares
constexpr int kMostRows = 256;     // filters of a block
constexpr int kMostTileColumns = 4;
constexpr int kMostTileRows = 8;

// One axis of the outputs: how many lanes it is cut for, and outputs of each.
struct LaneGrid {
  int64_t samples, rows, columns;
};

// Strides in floats.
struct PlaneStrides {
  int64_t sample, channel, row, column;
};

// How input becomes `packed`, for the outputs of one lane.
struct PackPlan {
  LaneGrid grid;
  bool interleaved;                   // neighbouring lanes hold neighbouring outputs of a row
  bool paired;                        // a lane holds two outputs of a row: dealt as even and odd ones
  int64_t out_rows, out_columns;      // of one lane
  int64_t height, width;              // of the input
  PlaneStrides strides;
  int64_t origin[2], stride[2];       // input row of output r and tap 0: r * stride + origin
  int64_t rows, phases, phase_width;  // packed, of one channel
  const int64_t* phase;               // which column phases
  int64_t plane;                      // floats of a channel
  int64_t pad_rows, pad_width;        // of a padded picture, by phases as well
  int64_t together;                   // channels padded before they are dealt
};

// Where outputs go.
struct OutPlan {
  int64_t height, width;
  PlaneStrides strides;
};

struct OutTile {
  int32_t row, column, rows, columns;
};

// The weight's tiles; columns and segments are uint8 or, if wide, int16.
struct SparseTiles {
  const float* values;
  const void* columns;
  const void* segments;
  const int32_t* offsets;  // [groups + 1][2]
  bool wide;
  int64_t blocks, parts, rows, channels;  // rows, channels: of a tile
};

// Input that comes next, fetched into the cache a little at a time beside the multiply-adds.
struct Ahead {
  const float *next, *end;
};

struct TileJob {
  PackPlan pack;
  OutPlan out;
  SparseTiles weight;
  const int64_t* table;     // column of a tile -> float offset in packed
  const int64_t* shift;     // filter -> float offset of its group's channels; null: all 0
  int64_t part_step, row_step;  // floats from part to part, and from output row to row
  bool chained;             // one row in all: the "rows" of a tile follow each other along it
  int64_t filters, samples;
  const float* bias;
  bool relu;
};

}  // namespace liveweight

LW_DECLARE(int tile_lanes())
LW_DECLARE(int tile_outputs())
LW_DECLARE(void tile_pack(const float* x, const TileJob& job, int64_t samples, int64_t begin, int64_t end,
                          float* scratch, float* packed))
LW_DECLARE(void tile_convolve(const float* packed, const TileJob& job, const OutTile& tile, int64_t block,
                              int64_t samples, Ahead& ahead, float* sums, float* y))
