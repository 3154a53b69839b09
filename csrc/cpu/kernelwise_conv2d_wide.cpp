// kernelwise_conv2d with 3 x 3 kernels of stride 1 on wide pictures: sums that are shifted once
// (kernelwise_conv2d_sums.h). Rows are read where they are, a filter's kept kernels over tiles of rows held in
// registers.
#include "kernelwise_conv2d_finish.h"
#include "kernelwise_conv2d_sums.h"

namespace liveweight {

struct WideJob {
  KeptFilters filters;
  int64_t channels, H, W, height, width, padding[2];  // height, width: of the output before any pooling
  int64_t vectors;                                    // of a row of outputs
  bool sides;                                         // whether columns beside a tile are read
  int64_t band;                                       // rows that all filters use together
};

}  // namespace liveweight

LW_DECLARE(void wide_columns(const float* x, const WideJob& job, int64_t begin, int64_t end, float* columns))
LW_DECLARE(void wide_filters(const float* x, const float* columns, const WideJob& job, const int32_t* order,
                             int64_t count, float* scratch, float* y))

namespace liveweight::LW_ISA {

// Columns beside the vectors of channels [begin, end), [vector][left, right][channel][padding, H, padding].
void wide_columns(const float* x, const WideJob& job, int64_t begin, int64_t end, float* columns) {
  const int64_t height = job.H + 2;
  for (int64_t v = 0; v < job.vectors; ++v) {
    for (int side = 0; side < 2; ++side) {
      const int64_t column = v * kLanes - job.padding[1] + (side ? kLanes + 1 : 0);
      if (column < 0 || column >= job.W) continue;
      float* to = columns + ((v * 2 + side) * job.channels + begin) * height;
      for (int64_t c = begin; c < end; ++c, to += height) {
        const float* from = x + (c - begin) * job.H * job.W + column;
        to[0] = to[height - 1] = 0.0f;
        for (int64_t r = 0; r < job.H; ++r) to[r + 1] = from[r * job.W];
      }
    }
  }
}

alignas(64) static const float kNothing[4 * 16] = {};

// Where output rows from r on, `rows` of them, of `vectors` vectors from v on read; but for the channel.
LW_INLINE SumsTile wide_tile(const WideJob& job, const float* columns, int64_t r, int64_t rows, int64_t v,
                             int64_t vectors) {
  const int64_t first_column = v * kLanes + 1 - job.padding[1], top = r - job.padding[0], height = job.H + 2;
  const int64_t last = first_column + (vectors - 1) * kLanes, side = job.channels * height;
  const bool left = first_column > 0, right = last + kLanes < job.W;
  SumsTile tile;
  tile.row = job.W;
  tile.plane = job.H * job.W;
  tile.skip_top = top < 0;
  tile.skip_bottom = top + rows + 1 >= job.H;
  tile.inside = first(int(clamp(job.W - last, 0, kLanes)));
  tile.before = left ? columns + v * 2 * side + top + 1 : kNothing;
  tile.after = right ? columns + ((v + vectors) * 2 - 1) * side + top + 1 : kNothing;
  tile.before_plane = left ? height : 0;
  tile.after_plane = right ? height : 0;
  return tile;
}

// Sums of filter o in output rows [r0, r0 + rows) to end.out. Tiles are as equal as possible.
LW_INLINE void wide_sums(const float* x, const float* columns, const WideJob& job, int64_t o, int64_t r0, int64_t rows,
                         const SumsEnd& end) {
  int64_t channel;
  const KernelList kernels = kernels_of(job.filters, o, channel);
  SumsEnd part = end;
  for (int64_t v = 0, vectors; v < job.vectors; v += vectors) {
    vectors = job.vectors - v < 2 ? 1 : 2;
    const int64_t middle = v * kLanes + 1 - job.padding[1];
    const bool whole = middle + vectors * kLanes <= job.W, last = v + vectors == job.vectors;
    part.lanes = last ? end.lanes : kLanes;
    for (int64_t done = 0, tiles = count_tiles(rows, vectors); tiles > 0; --tiles) {
      const int64_t some = (rows - done + tiles - 1) / tiles, r = r0 + done;
      SumsTile tile = wide_tile(job, columns, r, some, v, vectors);
      tile.before += channel * tile.before_plane;
      tile.after += channel * tile.after_plane;
      part.out = end.out + done * end.step + v * kLanes;
      find_sums_tile(some, vectors, whole, job.sides)(
          x + channel * tile.plane + (r - job.padding[0]) * job.W + middle, kernels, tile, part);
      done += some;
    }
  }
}

// Filters order[0 .. count) of a sample x; y is where filter 0 goes.
void wide_filters(const float* x, const float* columns, const WideJob& job, const int32_t* order, int64_t count,
               float* scratch, float* y) {
  const KeptFilters& filters = job.filters;
  const int64_t pool = filters.pool, height = job.height / pool, width = job.width / pool;
  const int64_t step = job.vectors * kLanes;
  for (int64_t r = 0; r < height * pool; r += job.band) {
    const int64_t rows = height * pool - r < job.band ? height * pool - r : job.band;
    for (int64_t n = 0; n < count; ++n) {
      const int64_t o = order[n];
      const float bias = filters.bias ? filters.bias[o] : 0.0f;
      float* to = y + (o * height + r / pool) * width;
      if (pool == 1) {
        const int lanes = int(job.width - (job.vectors - 1) * kLanes);
        wide_sums(x, columns, job, o, r, rows, {to, width, lanes, bias, filters.relu});
      } else {
        wide_sums(x, columns, job, o, r, rows, {scratch, step, kLanes, 0.0f, false});
        finish_pool(scratch, step, rows, job.width, pool, bias, filters.relu, to);
      }
    }
  }
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {
namespace {

struct WideRun {
  const KernelwiseConv& conv;
  WideJob job;

  int64_t buffer_floats(int64_t) const { return job.sides ? job.vectors * 2 * job.channels * (job.H + 2) : 0; }
  int64_t scratch_floats() const {
    return job.filters.pool == 1 ? 0 : job.band * job.vectors * cpu_lanes() + kSlack;
  }
  const float* sample_at(int64_t sample) const { return conv.x + sample * job.channels * job.H * job.W; }

  void fill(int64_t sample, int64_t begin, int64_t end, float* columns) const {
    const float* from = sample_at(sample) + begin * job.H * job.W;
    if (job.sides) LW_SELECT(wide_columns)(from, job, begin, end, columns);
  }

  void filters(int64_t sample, int64_t begin, int64_t end, const std::vector<int32_t>& order,
               const float* columns, float* scratch) const {
    float* y = conv.y + sample * conv.sizes.filters * conv.out_pixels();
    LW_SELECT(wide_filters)(sample_at(sample), columns, job, order.data(), end - begin, scratch, y);
  }
};

}  // namespace

bool prefer_wide(const ConvSizes& s, int64_t lanes) {
  return fits_sums(s) && s.W * 2 > lanes;
}

void run_wide(const KernelwiseConv& conv, int64_t begin, int64_t end) {
  const ConvSizes& s = conv.sizes;
  const int64_t lanes = cpu_lanes(), vectors = (s.width + lanes - 1) / lanes, pool = conv.filters.pool;
  WideJob job{conv.filters, s.C, s.H, s.W, s.height, s.width, {s.padding[0], s.padding[1]}, vectors, false, 0};
  job.sides = vectors > 2 || s.padding[1] == 0;
  job.band = pick_band(s.height / pool * pool, s.C * s.W, vectors * lanes, pool);
  run_items(WideRun{conv, job}, conv, begin, end);
}

}  // namespace liveweight
#endif  // LW_BASE
