// Plans and runs unstructured convolutions: how outputs are dealt to lanes, tiles, threads.
#pragma once

#include "unstructured_conv2d_input.h"

#ifdef LW_BASE
#include <algorithm>
#include <vector>

namespace liveweight {

constexpr int64_t kBandFloats = 448 * 1024;  // of a packed band: the second-level cache holds them
constexpr int64_t kPadFloats = 4096;  // of padded pictures at a time: they stay in the first-level cache

inline int64_t picture_floats(const PackPlan& p) {
  return p.grid.samples * p.pad_rows * p.phases * p.pad_width;
}

inline int64_t channels_together(const PackPlan& p) {
  return std::clamp<int64_t>(kPadFloats / std::max<int64_t>(picture_floats(p), 1), 1, 64);
}

inline int64_t scratch_floats(const PackPlan& p) { return p.together * picture_floats(p) + kSlack; }

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
      : input_(std::move(input)), exact_(exact), lanes_(LW_SELECT(tile_lanes)()),
        tile_outputs_(exact ? kExactOutputs : LW_SELECT(tile_outputs)()) {
    job_.out = out;
    job_.weight = weight;
    job_.filters = filters;
    job_.samples = input_.samples;
    job_.bias = bias;
    job_.relu = relu;
    kept_ = weight.offsets[2 * weight.blocks * weight.parts];
    if (!exact) flatten();
    phases_ = column_phases(input_.tap_column, input_.stride[1]);
    reach_[0] = largest(input_.tap_row);
    reach_[1] = largest(input_.tap_column) / input_.stride[1];
    pick_grid();
    if (!exact && job_.pack.grid.rows == 1) plan_bands();
    plan_tables(groups);
    plan_units();
  }

  void run(float* y) const {
    if (job_.samples == 0 || job_.filters == 0) return;
    const double outputs = double(job_.samples * bands_ * job_.out.height * job_.out.width);
    const int64_t threads = threads_for_work(double(kept_ + job_.filters) * outputs);
    const int64_t count = rounds() * bands_;
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

  // Channels [begin, end) of a turn: a band of rows of a round.
  void pack(int64_t turn, int64_t begin, int64_t end, float* scratch, float* packed) const {
    const int64_t first = turn / bands_ * job_.pack.grid.samples;
    const int64_t count = std::min(job_.pack.grid.samples, job_.samples - first);
    TileJob job = job_;
    job.pack.origin[0] += turn % bands_ * job.pack.out_rows * job.pack.stride[0];
    LW_SELECT(tile_pack)(input_.data + first * input_.strides.sample, job, count, begin, end, scratch, packed);
  }

 private:
  // Rows of a pointwise convolution follow each other: one long row leaves no lanes empty.
  void flatten() {
    TileInput& in = input_;
    OutPlan& out = job_.out;
    const bool pointwise = in.tap_row.size() == 1 && in.stride[0] == 1 && in.stride[1] == 1 &&
                           in.origin[0] == 0 && in.origin[1] == 0;
    if (!pointwise || in.height != out.height || in.width != out.width) return;
    if (in.strides.row != in.width * in.strides.column || out.strides.row != out.width * out.strides.column) return;
    in.width = out.width = in.width * in.height;
    in.height = out.height = 1;
  }

  // Fills in the pack plan for a grid; returns its cost in multiply-adds of a vector.
  double plan_grid(LaneGrid grid, PackPlan& p) const {
    const int64_t per_row = input_.stride[1];
    p.grid = grid;
    p.out_rows = (job_.out.height + grid.rows - 1) / grid.rows;
    p.out_columns = (job_.out.width + grid.columns - 1) / grid.columns;
    p.interleaved = grid.columns == lanes_ && (p.out_columns == 1 || (reach_[1] == 0 && per_row == 1));
    p.paired = !p.interleaved && p.out_columns == 2 && per_row == 1 && grid.columns * 4 >= lanes_;
    p.phases = int64_t(phases_.size());
    p.phase_width = p.out_columns + reach_[1];
    p.pad_width = grid.columns * p.out_columns + reach_[1];
    size_planes(p);
    const int64_t vectors = p.plane / lanes_;
    const double outputs = double(p.out_rows * p.out_columns);
    const double repeats = double((job_.samples + grid.samples - 1) / grid.samples);
    // A short tile spends more on broadcasts; planes beyond the second-level cache stream slowly.
    double compute = outputs * double(kept_) * (1.0 + 1.2 / std::min(outputs, double(tile_outputs_)));
    if (input_.channels * p.plane * 4 > (1 << 20)) compute *= 1.25;
    const double in = price(p, input_.strides) * double(vectors * input_.channels);
    const double out = price(p, job_.out.strides) * outputs * double(job_.filters);
    return repeats * (compute + in + out);
  }

  // Multiply-adds that dealing a vector takes, to or from memory with these strides.
  double price(const PackPlan& p, const PlaneStrides& strides) const {
    if (p.grid.samples == lanes_ && strides.sample == 1) return 2;
    if (strides.column != 1) return 24;
    return p.interleaved ? 2 : p.paired ? 3 : 6;
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

  void size_planes(PackPlan& p) const {
    p.rows = (p.out_rows - 1) * input_.stride[0] + reach_[0] + 1;
    p.pad_rows = (p.grid.rows * p.out_rows - 1) * input_.stride[0] + reach_[0] + 1;
    p.plane = (p.rows * p.phases * p.phase_width + (4 - p.phase_width % 4) % 4) * lanes_;
  }

  // Cuts planes that the second-level cache does not hold into bands of as many rows each.
  void plan_bands() {
    PackPlan& p = job_.pack;
    const int64_t height = job_.out.height;
    while (input_.channels * p.plane > kBandFloats && bands_ < height) {
      do ++bands_;
      while (height % bands_);
      p.out_rows = height / bands_;
      size_planes(p);
    }
    job_.out.height = p.out_rows;
    p.together = channels_together(p);
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
    const int64_t most = std::min<int64_t>(tile_outputs_, kMostTileRows);
    if (job_.pack.interleaved && job_.pack.rows == 1) {
      job_.chained = true;
      job_.row_step = lanes_;
      split_evenly(job_.pack.out_columns, most, [&](int64_t column, int64_t columns) {
        tiles_.push_back({0, int32_t(column), int32_t(columns), 1});
      });
    } else split_evenly(job_.pack.out_columns, kMostTileColumns, [&](int64_t column, int64_t columns) {
      split_evenly(job_.pack.out_rows, std::min(tile_outputs_ / columns, most), [&](int64_t row, int64_t rows) {
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

  // What a round reads, where that lies in one piece.
  Ahead next_input(int64_t round) const {
    const int64_t sample = input_.channels * input_.height * input_.width;
    if (input_.strides.sample != sample) return {};
    const int64_t first = round * job_.pack.grid.samples;
    const int64_t count = std::min(job_.pack.grid.samples, job_.samples - first);
    return {input_.data + first * sample, input_.data + (first + count) * sample};
  }

  int64_t sums_floats() const { return kMostRows * kTileOutputs * lanes_; }

  void convolve(int64_t turn, int64_t begin, int64_t end, const float* packed, Ahead ahead, float* sums,
                float* y) const {
    const int64_t first = turn / bands_ * job_.pack.grid.samples;
    const int64_t count = std::min(job_.pack.grid.samples, job_.samples - first);
    y += first * job_.out.strides.sample + turn % bands_ * job_.out.height * job_.out.strides.row;
    for (int64_t unit = begin; unit < end; ++unit) {
      const auto [tile, block] = at_unit(unit);
      LW_SELECT(tile_convolve)(packed, job_, *tile, block, count, ahead, sums, y);
    }
  }

  // Each worker packs and convolves turns of its own.
  void run_by_sample(int64_t threads, float* y) const {
    const int64_t count = rounds() * bands_;
    parallel_for(count, (count + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      Workspace<float> packed(packed_floats()), scratch(scratch_floats(job_.pack)), sums(sums_floats());
      for (int64_t turn = begin; turn < end; ++turn) {
        pack(turn, 0, input_.channels, scratch.data(), packed.data());
        const Ahead ahead = bands_ == 1 && turn + 1 < end ? next_input(turn + 1) : Ahead{};
        convolve(turn, 0, int64_t(costs_.size()) - 1, packed.data(), ahead, sums.data(), y);
      }
    });
  }

  // All pack channels of a turn, then each takes units of about the same cost together.
  void run_by_unit(int64_t threads, float* y) const {
    Workspace<float> packed(packed_floats());
    const int64_t channels = (input_.channels + threads - 1) / threads;
    for (int64_t turn = 0; turn < rounds() * bands_; ++turn) {
      parallel_for(input_.channels, std::max<int64_t>(channels, 1), [&](int64_t begin, int64_t end) {
        Workspace<float> scratch(scratch_floats(job_.pack));
        pack(turn, begin, end, scratch.data(), packed.data());
      });
      parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
        Workspace<float> sums(sums_floats());
        convolve(turn, share(begin, threads), share(end, threads), packed.data(), {}, sums.data(), y);
      });
    }
  }

  int64_t share(int64_t part, int64_t parts) const {
    if (part == parts) return int64_t(costs_.size()) - 1;
    const double wanted = costs_.back() * double(part) / double(parts);
    return std::lower_bound(costs_.begin(), costs_.end(), wanted) - costs_.begin();
  }

  TileInput input_;
  int64_t bands_ = 1;
  bool exact_;  // no lane's block may stick out of the output
  int64_t lanes_, tile_outputs_, kept_, reach_[2];
  std::vector<int64_t> phases_, table_, shift_;
  std::vector<OutTile> tiles_;
  std::vector<double> costs_;
  TileJob job_{};
};

}  // namespace liveweight
#endif  // LW_BASE
