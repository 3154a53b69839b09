// Plans and runs unstructured convolutions: how outputs are dealt to lanes, tiles, threads.
#pragma once

#include "conv2d.h"
#include "unstructured_conv2d.h"

#ifdef LW_BASE
#include <algorithm>
#include <vector>

namespace liveweight {

constexpr int64_t kPadFloats = 4096;  // of padded pictures at a time: they stay in the first-level cache

inline int64_t picture_floats(const PackPlan& p) {
  return p.grid.samples * p.pad_rows * p.phases * p.pad_width;
}

inline int64_t channels_together(const PackPlan& p) {
  return std::clamp<int64_t>(kPadFloats / std::max<int64_t>(picture_floats(p), 1), 1, 64);
}

inline int64_t scratch_floats(const PackPlan& p) { return p.together * picture_floats(p) + kSlack; }

// What is convolved: x[s, c, r, q] at data + the strides; tap t of output (i, j) reads row
// i * stride + origin + tap_row[t], and its column likewise; offsets of taps are >= 0.
struct TileInput {
  const float* data;
  int64_t samples, channels, height, width;
  PlaneStrides strides;
  int64_t origin[2], stride[2];
  std::vector<int64_t> tap_row, tap_column;
};

inline PlaneStrides strides_of(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// Data of a tensor [B, C, H, W] with any strides; of this shape, if one is given.
inline const float* check_planes(const char* op, const char* name, const Tensor& t,
                                 const std::vector<int64_t>& shape) {
  LW_CHECK(t.is_cpu() && t.dim() == 4 && t.scalar_type() == ScalarType::Float, op, ": expected ", name,
           " [B, C, H, W] float32 on the CPU, got ", shape_of(t));
  for (size_t d = 0; d < shape.size(); ++d) {
    LW_CHECK(t.size(int64_t(d)) == shape[d], op, ": expected ", name, " [", shape[0], ", ", shape[1], ", ",
             shape[2], ", ", shape[3], "], got ", shape_of(t));
  }
  return static_cast<const float*>(t.const_data_ptr());
}

// Input of forward: taps at their offsets from a corner that lies outside by the padding.
inline TileInput forward_input(const ConvSizes& s, const float* x, const PlaneStrides& strides) {
  TileInput input{x, s.B, s.C, s.H, s.W, strides, {}, {}, {}, {}};
  for (int d = 0; d < 2; ++d) input.origin[d] = -s.padding[d], input.stride[d] = s.stride[d];
  for (int64_t i = 0; i < s.kernel[0]; ++i) {
    for (int64_t j = 0; j < s.kernel[1]; ++j) {
      input.tap_row.push_back(i * s.dilation[0]);
      input.tap_column.push_back(j * s.dilation[1]);
    }
  }
  return input;
}

// Threads worth waking for so many multiply-adds.
inline int64_t threads_for_work(double work) {
  return work < 5e5 ? 1 : int64_t(torch::stable::get_num_threads());
}

// The weight's tiles, guarded: offsets rise, and wide indices stay in their tile. Narrow ones cannot
// leave the room that every index of 8 bits has (TileConv), so that no look at each is needed.
inline SparseTiles check_tiles(const char* op, const float* values, int64_t kept, const Tensor& columns,
                               const Tensor& segments, const Tensor& offsets,
                               const std::vector<int64_t>& shape, const std::vector<int64_t>& tile) {
  LW_CHECK(shape.size() == 4 && *std::min_element(shape.begin(), shape.end()) >= 0, op, ": bad shape");
  LW_CHECK(tile.size() == 2 && tile[0] >= 1 && tile[0] <= kMostRows && tile[1] >= 1, op, ": bad tile");
  SparseTiles w{};
  const int64_t span = tile[1] * shape[2] * shape[3];
  w.wide = span > 256;
  const ScalarType type = w.wide ? ScalarType::Short : ScalarType::Byte;
  w.values = values;
  w.columns = w.wide ? static_cast<const void*>(checked_data<int16_t>(op, "columns", columns, 1, type))
                     : checked_data<uint8_t>(op, "columns", columns, 1, type);
  w.segments = w.wide ? static_cast<const void*>(checked_data<int16_t>(op, "segments", segments, 2, type))
                      : checked_data<uint8_t>(op, "segments", segments, 2, type);
  w.offsets = checked_data<int32_t>(op, "offsets", offsets, 2, ScalarType::Int);
  w.rows = tile[0], w.channels = tile[1];
  w.blocks = (shape[0] + tile[0] - 1) / tile[0];
  w.parts = (shape[1] + tile[1] - 1) / tile[1];
  const int64_t groups = w.blocks * w.parts;
  LW_CHECK(columns.numel() == kept, op, ": expected ", columns.numel(), " values, got ", kept);
  LW_CHECK(segments.size(1) == 2 && offsets.size(1) == 2, op, ": segments and offsets must have two columns");
  LW_CHECK(offsets.size(0) == groups + 1, op, ": expected ", groups + 1, " offsets, got ", offsets.size(0));
  bool ordered = w.offsets[0] == 0 && w.offsets[1] == 0 && w.offsets[2 * groups] == kept &&
                 w.offsets[2 * groups + 1] == segments.size(0);
  for (int64_t i = 0; i < 2 * groups; ++i) ordered &= w.offsets[i] <= w.offsets[i + 2];
  LW_CHECK(ordered, op, ": offsets must rise from 0 to ", kept, " and ", segments.size(0));
  if (!w.wide) return w;
  bool inside = true;
  for (int64_t i = 0; i < kept; ++i) {
    const int16_t column = static_cast<const int16_t*>(w.columns)[i];
    inside &= column >= 0 && column < span;
  }
  for (int64_t i = 0; i < segments.size(0); ++i) {
    const int16_t* segment = static_cast<const int16_t*>(w.segments) + 2 * i;
    inside &= segment[0] >= 0 && segment[0] < w.rows && segment[1] >= 0;
  }
  LW_CHECK(inside, op, ": columns or segments leave their tile");
  return w;
}

// Which remainders of the taps' columns by the stride occur, rising.
inline std::vector<int64_t> column_phases(const std::vector<int64_t>& taps, int64_t stride) {
  std::vector<int64_t> phases;
  for (int64_t tap : taps) phases.push_back(tap % stride);
  std::sort(phases.begin(), phases.end());
  phases.erase(std::unique(phases.begin(), phases.end()), phases.end());
  return phases;
}

inline int64_t largest(const std::vector<int64_t>& numbers) {
  return numbers.empty() ? 0 : *std::max_element(numbers.begin(), numbers.end());
}

// Splits count into as few parts of at most `most` as possible, as equal as possible; calls use(from, size).
template <class Use>
void split_evenly(int64_t count, int64_t most, const Use& use) {
  for (int64_t parts = (count + most - 1) / most, from = 0; parts > 0; --parts) {
    const int64_t size = (count - from + parts - 1) / parts;
    use(from, size);
    from += size;
  }
}

class TileConv {
 public:
  TileConv(TileInput input, OutPlan out, SparseTiles weight, int64_t filters, int64_t groups,
           const float* bias, bool relu, bool exact = false)
      : input_(std::move(input)), exact_(exact), lanes_(LW_SELECT(tile_lanes)()) {
    job_.out = out;
    job_.weight = weight;
    job_.filters = filters;
    job_.samples = input_.samples;
    job_.bias = bias;
    job_.relu = relu;
    kept_ = weight.offsets[2 * weight.blocks * weight.parts];
    phases_ = column_phases(input_.tap_column, input_.stride[1]);
    reach_[0] = largest(input_.tap_row);
    reach_[1] = largest(input_.tap_column) / input_.stride[1];
    pick_grid();
    plan_tables(groups);
    plan_units();
  }

  void run(float* y) const {
    if (job_.samples == 0 || job_.filters == 0) return;
    const double work = double(kept_ + job_.filters) * double(job_.samples * job_.out.height * job_.out.width);
    const int64_t threads = threads_for_work(work);
    const int64_t count = rounds();
    if (threads == 1 || count % threads == 0 || count >= 4 * threads) return run_by_sample(threads, y);
    run_by_unit(threads, y);
  }

  const TileJob& job() const { return job_; }
  const std::vector<OutTile>& tiles() const { return tiles_; }

  // How often the samples fill the lanes.
  int64_t rounds() const {
    return (job_.samples + job_.pack.grid.samples - 1) / job_.pack.grid.samples;
  }

  // Room for any channel that an index can name.
  int64_t packed_floats() const {
    const SparseTiles& w = job_.weight;
    return (input_.channels + w.parts * w.channels + w.channels) * job_.pack.plane;
  }

  // Channels [begin, end) of a round.
  void pack(int64_t round, int64_t begin, int64_t end, float* scratch, float* packed) const {
    const int64_t first = round * job_.pack.grid.samples;
    const int64_t count = std::min(job_.pack.grid.samples, job_.samples - first);
    LW_SELECT(tile_pack)(input_.data + first * input_.strides.sample, job_, count, begin, end, scratch, packed);
  }

 private:
  // Fills in the pack plan for a grid; returns its cost in multiply-adds of a vector.
  double plan_grid(LaneGrid grid, PackPlan& p) const {
    const int64_t per_row = input_.stride[1];
    p.grid = grid;
    p.out_rows = (job_.out.height + grid.rows - 1) / grid.rows;
    p.out_columns = (job_.out.width + grid.columns - 1) / grid.columns;
    p.interleaved = grid.columns == lanes_ && (p.out_columns == 1 || (reach_[1] == 0 && per_row == 1));
    p.rows = (p.out_rows - 1) * input_.stride[0] + reach_[0] + 1;
    p.phases = int64_t(phases_.size());
    p.phase_width = p.out_columns + reach_[1];
    p.pad_rows = (grid.rows * p.out_rows - 1) * input_.stride[0] + reach_[0] + 1;
    p.pad_width = grid.columns * p.out_columns + reach_[1];
    const int64_t vectors = p.rows * p.phases * p.phase_width + (4 - p.phase_width % 4) % 4;
    p.plane = vectors * lanes_;
    const bool direct = grid.samples == lanes_ && input_.strides.sample == 1;
    const double outputs = double(p.out_rows * p.out_columns);
    const double repeats = double((job_.samples + grid.samples - 1) / grid.samples);
    // A short tile spends more on broadcasts; planes beyond the second-level cache stream slowly.
    double compute = outputs * double(kept_) * (1.0 + 1.2 / std::min(outputs, double(kTileOutputs)));
    if (input_.channels * p.plane * 4 > (1 << 20)) compute *= 1.25;
    const double move = p.interleaved || direct ? 2 : 6;
    return repeats * (compute + move * (double(vectors * input_.channels) + outputs * double(job_.filters)));
  }

  void pick_grid() {
    PackPlan& best = job_.pack;
    double least = -1;
    for (int64_t samples = 1; samples <= lanes_; samples *= 2) {
      for (int64_t rows = 1; samples * rows <= lanes_; rows *= 2) {
        PackPlan p{};
        const int64_t columns = lanes_ / (samples * rows);
        if (exact_ && (job_.out.height % rows || job_.out.width % columns)) continue;
        const double cost = plan_grid({samples, rows, columns}, p);
        if (least < 0 || cost < least) least = cost, best = p;
      }
    }
    best.together = channels_together(best);
    best.height = input_.height;
    best.width = input_.width;
    best.strides = input_.strides;
    best.phase = phases_.data();
    for (int d = 0; d < 2; ++d) best.origin[d] = input_.origin[d], best.stride[d] = input_.stride[d];
  }

  void plan_tables(int64_t groups) {
    const PackPlan& p = job_.pack;
    const int64_t row = p.phases * p.phase_width * lanes_, taps = int64_t(input_.tap_row.size());
    const SparseTiles& w = job_.weight;
    table_.assign(size_t(std::max<int64_t>(w.channels * taps, 256)), 0);
    for (int64_t c = 0; c < w.channels; ++c) {
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t column = input_.tap_column[size_t(t)], step = input_.stride[1];
        const int64_t phase = std::find(phases_.begin(), phases_.end(), column % step) - phases_.begin();
        table_[size_t(c * taps + t)] = c * p.plane + input_.tap_row[size_t(t)] * row +
                                       (phase * p.phase_width + column / step) * lanes_;
      }
    }
    job_.table = table_.data();
    job_.part_step = w.channels * p.plane;
    job_.row_step = row * p.stride[0];
    if (groups == 1) return;
    shift_.assign(size_t(w.blocks * w.rows + kMostRows), 0);
    const int64_t group_filters = std::max<int64_t>(job_.filters / groups, 1);
    for (int64_t o = 0; o < job_.filters; ++o) {
      shift_[size_t(o)] = o / group_filters * (input_.channels / groups) * p.plane;
    }
    job_.shift = shift_.data();
  }

  // Units of work of one round: tiles x blocks, and what all before each cost.
  void plan_units() {
    split_evenly(job_.pack.out_columns, kMostTileColumns, [&](int64_t column, int64_t columns) {
      split_evenly(job_.pack.out_rows, kTileOutputs / columns, [&](int64_t row, int64_t rows) {
        tiles_.push_back({int32_t(row), int32_t(column), int32_t(rows), int32_t(columns)});
      });
    });
    const SparseTiles& w = job_.weight;
    costs_.push_back(0);
    for (int64_t unit = 0; unit < int64_t(tiles_.size()) * w.blocks; ++unit) {
      const auto [tile, block] = at_unit(unit);
      const int32_t *from = w.offsets + 2 * block * w.parts, *to = from + 2 * w.parts;
      const double entries = double(to[0] - from[0]) + 3.0 * double(to[1] - from[1]) + 4.0 * double(w.rows);
      costs_.push_back(costs_.back() + entries * (1.0 + double(tile->rows * tile->columns)));
    }
  }

  // All tiles of a block, or all blocks of a tile, together: whichever keeps more in cache.
  std::pair<const OutTile*, int64_t> at_unit(int64_t unit) const {
    const int64_t tiles = int64_t(tiles_.size()), blocks = job_.weight.blocks;
    const bool by_block = kept_ * 5 > input_.channels * job_.pack.plane * 4;
    const int64_t tile = by_block ? unit % tiles : unit / blocks;
    return {&tiles_[size_t(tile)], by_block ? unit / tiles : unit % blocks};
  }

  int64_t sums_floats() const { return kMostRows * kTileOutputs * lanes_; }

  void convolve(int64_t round, int64_t begin, int64_t end, const float* packed, float* sums, float* y) const {
    const int64_t first = round * job_.pack.grid.samples;
    const int64_t count = std::min(job_.pack.grid.samples, job_.samples - first);
    for (int64_t unit = begin; unit < end; ++unit) {
      const auto [tile, block] = at_unit(unit);
      LW_SELECT(tile_convolve)(packed, job_, *tile, block, count, sums, y + first * job_.out.strides.sample);
    }
  }

  // Each worker packs and convolves rounds of its own.
  void run_by_sample(int64_t threads, float* y) const {
    const int64_t count = rounds();
    parallel_for(count, (count + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      Workspace<float> packed(packed_floats()), scratch(scratch_floats(job_.pack)), sums(sums_floats());
      for (int64_t round = begin; round < end; ++round) {
        pack(round, 0, input_.channels, scratch.data(), packed.data());
        convolve(round, 0, int64_t(costs_.size()) - 1, packed.data(), sums.data(), y);
      }
    });
  }

  // All pack channels of a round, then each takes units of about the same cost together.
  void run_by_unit(int64_t threads, float* y) const {
    Workspace<float> packed(packed_floats());
    const int64_t channels = (input_.channels + threads - 1) / threads;
    for (int64_t round = 0; round < rounds(); ++round) {
      parallel_for(input_.channels, std::max<int64_t>(channels, 1), [&](int64_t begin, int64_t end) {
        Workspace<float> scratch(scratch_floats(job_.pack));
        pack(round, begin, end, scratch.data(), packed.data());
      });
      parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
        Workspace<float> sums(sums_floats());
        convolve(round, share(begin, threads), share(end, threads), packed.data(), sums.data(), y);
      });
    }
  }

  int64_t share(int64_t part, int64_t parts) const {
    if (part == parts) return int64_t(costs_.size()) - 1;
    const double wanted = costs_.back() * double(part) / double(parts);
    return std::lower_bound(costs_.begin(), costs_.end(), wanted) - costs_.begin();
  }

  TileInput input_;
  bool exact_;  // no lane's block may stick out of the output
  int64_t lanes_, kept_, reach_[2];
  std::vector<int64_t> phases_, table_, shift_;
  std::vector<OutTile> tiles_;
  std::vector<double> costs_;
  TileJob job_{};
};

}  // namespace liveweight
#endif  // LW_BASE
