// Gradient of an unstructured convolution to the entries that it keeps, at sparse cost.
//
// Output gradients are dealt to lanes as the outputs of forward are (unstructured_conv2d.h). Then each
// entry is a dot product of its filter's gradients with the vectors of its tap: a tile of gradients is
// held in registers for all entries of a segment. Each entry has one owner, which adds up all samples.
#include "unstructured_conv2d_run.h"

LW_DECLARE(void dot_group(const float* packed, const float* grad, const TileJob& job,
                          const OutTile* tiles, int64_t tile_count, int64_t group, int64_t grad_plane,
                          float* partial, bool add, float* out))

namespace liveweight::LW_ISA {

template <class Index, int kRows, int kColumns>
void dot_tile(const float* x, const float* grad, const TileJob& job, int64_t group, int64_t grad_plane,
              float* partial) {
  const int32_t *from = job.weight.offsets + 2 * group, *to = from + 2;
  const Index* columns = static_cast<const Index*>(job.weight.columns);
  const Index* segments = static_cast<const Index*>(job.weight.segments);
  const int64_t block = group / job.weight.parts, grad_row = (job.chained ? 1 : job.pack.out_columns) * kLanes;
  int64_t at = from[0];
  for (int64_t i = from[1]; i < to[1]; ++i) {
    const int64_t o = block * job.weight.rows + segments[2 * i];
    int64_t end = at + segments[2 * i + 1] + 1;
    if (end > to[0]) end = to[0];
    if (o >= job.filters) end = at;
    const float* g = grad + o * grad_plane;
    const float* source = job.shift ? x + job.shift[o] : x;
    Vec held[kRows * kColumns];
#pragma GCC unroll 8
    for (int v = 0; v < kRows * kColumns; ++v) {
      held[v] = end > at ? load(g + v / kColumns * grad_row + v % kColumns * kLanes) : zero();
    }
    for (; at < end; ++at, partial += kLanes) {
      const float* p = source + job.table[columns[at]];
      Vec sum[2] = {load(partial), zero()};
#pragma GCC unroll 8
      for (int v = 0; v < kRows * kColumns; ++v) {
        sum[v % 2] = fma(held[v], load(p + v / kColumns * job.row_step + v % kColumns * kLanes), sum[v % 2]);
      }
      store(partial, sum[0] + sum[1]);
    }
  }
}

template <class Index, int kColumns>
LW_INLINE auto pick_rows(int rows) {
  constexpr int kMost = kExactOutputs / kColumns;
  auto run = dot_tile<Index, 1, kColumns>;
  if constexpr (kMost >= 2) run = rows == 2 ? dot_tile<Index, 2, kColumns> : run;
  if constexpr (kMost >= 4) {
    run = rows == 3 ? dot_tile<Index, 3, kColumns> : rows == 4 ? dot_tile<Index, 4, kColumns> : run;
  }
  if constexpr (kMost >= 8) {
    run = rows == 5 ? dot_tile<Index, 5, kColumns> : rows == 6 ? dot_tile<Index, 6, kColumns> : run;
    run = rows == 7 ? dot_tile<Index, 7, kColumns> : rows == 8 ? dot_tile<Index, 8, kColumns> : run;
  }
  return run;
}

template <class Index>
LW_INLINE auto pick_tile(const OutTile& tile) {
  switch (tile.columns) {
    case 1: return pick_rows<Index, 1>(tile.rows);
    case 2: return pick_rows<Index, 2>(tile.rows);
    case 3: return pick_rows<Index, 3>(tile.rows);
    default: return pick_rows<Index, 4>(tile.rows);
  }
}

// Gradients of all entries of a group, for one round of samples; partial: a vector for each entry.
void dot_group(const float* packed, const float* grad, const TileJob& job, const OutTile* tiles,
               int64_t tile_count, int64_t group, int64_t grad_plane, float* partial, bool add, float* out) {
  const int64_t first = job.weight.offsets[2 * group], count = job.weight.offsets[2 * group + 2] - first;
  for (int64_t i = 0; i < count; ++i) store(partial + i * kLanes, zero());
  const float* x = packed + group % job.weight.parts * job.part_step;
  for (const OutTile* tile = tiles; tile < tiles + tile_count; ++tile) {
    const auto run = job.weight.wide ? pick_tile<int16_t>(*tile) : pick_tile<uint8_t>(*tile);
    run(x + tile->row * job.row_step + tile->column * kLanes,
        grad + (tile->row * job.pack.out_columns + tile->column) * kLanes, job, group, grad_plane, partial);
  }
  for (int64_t i = 0; i < count; ++i) {
    out[first + i] = (add ? out[first + i] : 0.0f) + reduce_add(load(partial + i * kLanes));
  }
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {
namespace {

// How output gradients are dealt, in step with the outputs of `outputs`.
PackPlan grad_plan(const PackPlan& outputs, const ConvSizes& s, const PlaneStrides& strides, int64_t lanes) {
  static constexpr int64_t kOnePhase[1] = {0};
  PackPlan p = outputs;
  p.height = s.height, p.width = s.width, p.strides = strides;
  for (int d = 0; d < 2; ++d) p.origin[d] = 0, p.stride[d] = 1;
  p.rows = p.out_rows, p.phases = 1, p.phase_width = p.out_columns, p.phase = kOnePhase;
  p.plane = (p.rows * p.phase_width + (4 - p.phase_width % 4) % 4) * lanes;
  p.pad_rows = p.grid.rows * p.out_rows, p.pad_width = p.grid.columns * p.out_columns;
  p.together = channels_together(p);
  return p;
}

struct GradValues {
  const TileConv& conv;
  TileJob grad_job;
  const float* grad;
  int64_t kept;

  int64_t most_entries() const {
    const SparseTiles& w = conv.job().weight;
    int64_t most = 0;
    for (int64_t g = 0; g < w.blocks * w.parts; ++g) {
      most = std::max<int64_t>(most, w.offsets[2 * g + 2] - w.offsets[2 * g]);
    }
    return most;
  }

  // Group at which part `part` of `parts` begins when entries are shared evenly.
  int64_t share(int64_t part, int64_t parts) const {
    const SparseTiles& w = conv.job().weight;
    const int64_t groups = w.blocks * w.parts;
    int64_t g = 0;
    while (g < groups && w.offsets[2 * g] * parts < kept * part) ++g;
    return part == parts ? groups : g;
  }

  void pack(int64_t round, int64_t threads, int64_t channels, float* x, float* g) const {
    const PackPlan& p = grad_job.pack;
    const int64_t first = round * p.grid.samples, total = channels + grad_job.filters;
    const int64_t count = std::min(p.grid.samples, conv.job().samples - first);
    parallel_for(total, (total + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      Workspace<float> scratch(std::max(scratch_floats(conv.job().pack), scratch_floats(p)));
      if (begin < channels) conv.pack(round, begin, std::min(end, channels), scratch.data(), x);
      const int64_t from = std::max<int64_t>(begin - channels, 0);
      if (end <= channels) return;
      LW_SELECT(tile_pack)(grad + first * p.strides.sample, grad_job, count, from, end - channels,
                           scratch.data(), g);
    });
  }

  void run(int64_t threads, int64_t channels, int64_t lanes, float* out) const {
    Workspace<float> x(conv.packed_floats()), g(grad_job.filters * grad_job.pack.plane);
    for (int64_t round = 0; round < conv.rounds(); ++round) {
      pack(round, threads, channels, x.data(), g.data());
      parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
        Workspace<float> partial(most_entries() * lanes + kSlack);
        for (int64_t group = share(begin, threads); group < share(end, threads); ++group) {
          LW_SELECT(dot_group)(x.data(), g.data(), conv.job(), conv.tiles().data(),
                               int64_t(conv.tiles().size()), group, grad_job.pack.plane, partial.data(),
                               round > 0, out);
        }
      });
    }
  }
};

Tensor unstructured_conv2d_grad_values(const Tensor& grad, const Tensor& x, const Tensor& columns,
                                       const Tensor& segments, const Tensor& offsets,
                                       std::vector<int64_t> shape, std::vector<int64_t> tile,
                                       std::vector<int64_t> stride, std::vector<int64_t> padding,
                                       std::vector<int64_t> dilation, int64_t groups) {
  const char* op = "unstructured_conv2d_grad_values";
  const int64_t kept = columns.numel();
  const SparseTiles w = check_tiles(op, nullptr, kept, columns, segments, offsets, shape, tile);
  const float* data = check_planes(op, "x", x, {});
  const ConvSizes s = conv_sizes(op, {x.size(0), x.size(1), x.size(2), x.size(3)}, shape[0],
                                 {shape[2], shape[3]}, stride, padding, dilation, groups);
  LW_CHECK(s.C == shape[1] * groups, op, ": expected ", shape[1] * groups, " channels, got ", s.C);
  const float* from = check_planes(op, "grad", grad, {s.B, s.filters, s.height, s.width});
  Tensor out = torch::stable::new_zeros(x, {kept});
  if (s.B == 0 || kept == 0) return out;
  const TileConv conv(forward_input(s, data, strides_of(x)), {s.height, s.width, {}}, w, s.filters, groups,
                      nullptr, false, true);
  const int64_t lanes = LW_SELECT(tile_lanes)();
  GradValues task{conv, {}, from, kept};
  task.grad_job.pack = grad_plan(conv.job().pack, s, strides_of(grad), lanes);
  task.grad_job.filters = s.filters;
  task.run(threads_for_work(double(kept) * double(s.B * s.height * s.width)), s.C, lanes,
           static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace
}  // namespace liveweight

STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) {
  m.impl("unstructured_conv2d_grad_values", TORCH_BOX(&liveweight::unstructured_conv2d_grad_values));
}
#endif  // LW_BASE
