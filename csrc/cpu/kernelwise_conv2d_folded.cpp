// kernelwise_conv2d with 3 x 3 kernels of stride 1 on narrow pictures: sums that are shifted once
// (kernelwise_conv2d_sums.h). Pictures are folded: the lanes hold rows of a few samples, or of several equal
// parts of one sample's rows, side by side.
#include "kernelwise_conv2d_finish.h"
#include "kernelwise_conv2d_sums.h"

namespace liveweight {

struct FoldedJob {
  KeptFilters filters;
  int64_t H, W;  // of the input, and of the output before any pooling
  int64_t slot;  // lanes of a row
};

// How a set of samples is folded: lanes hold `samples` x `parts` x slot; part g begins with row g * rows.
// One vector a plane: `samples` planes beside each other.
struct Fold {
  int64_t samples, parts, rows;
  bool plane;

  int64_t stored() const { return plane ? samples : parts > 1 ? rows + 2 : rows; }  // vectors of a channel
};

}  // namespace liveweight

LW_DECLARE(void fold_planes(const float* x, const FoldedJob& job, const Fold& fold, int64_t sample, int64_t begin,
                            int64_t end, float* planes))
LW_DECLARE(void folded_filters(const float* planes, const FoldedJob& job, const Fold& fold, const int32_t* order,
                               int64_t count, float* scratch, float* y, int64_t y_sample))

namespace liveweight::LW_ISA {

// A row of `width` floats, zeros up to `slot` after it. kWidth: the width, or 0 for others.
template <int kWidth>
LW_INLINE void fold_row(const float* in, int64_t width, int64_t slot, float* out) {
  if constexpr (kWidth > 0) store_lanes<kWidth>(out, load_lanes<kWidth>(in));
  else store_first(out, load_first(in, int(width)), int(slot));
}

template <int kWidth>
LW_INLINE void fold_channels(const float* x, const FoldedJob& job, const Fold& fold, int64_t sample, int64_t count,
                             float* planes) {
  const int64_t above = !fold.plane && fold.parts > 1 ? 1 : 0, rows = fold.rows + 2 * above;
  const int64_t sample_step = fold.plane ? kLanes : fold.parts * job.slot;
  for (int64_t c = 0; c < count; ++c, x += job.H * job.W, planes += fold.stored() * kLanes) {
    for (int64_t s = 0; s < fold.samples; ++s) {
      for (int64_t g = 0; g < fold.parts; ++g) {
        const int64_t r0 = g * fold.rows - above;
        const float* from = x + s * sample + r0 * job.W;
        float* to = planes + s * sample_step + g * job.slot;
        for (int64_t t = 0; t < rows; ++t, from += job.W, to += kLanes) {
          if (r0 + t >= 0 && r0 + t < job.H) fold_row<kWidth>(from, job.W, job.slot, to);
          else fill_zero(to, job.slot);
        }
      }
    }
  }
}

// Channels [begin, end) of a set of samples, `sample` floats apart, folded into vectors: [channel][vector].
void fold_planes(const float* x, const FoldedJob& job, const Fold& fold, int64_t sample, int64_t begin, int64_t end,
                 float* planes) {
  float* to = planes + begin * fold.stored() * kLanes;
  if (job.W == 8) fold_channels<8>(x, job, fold, sample, end - begin, to);
  else if (job.W == 4) fold_channels<4>(x, job, fold, sample, end - begin, to);
  else fold_channels<0>(x, job, fold, sample, end - begin, to);
}

// A row whose floats one store has written. kWidth as above.
template <int kWidth>
LW_INLINE void copy_short(const float* in, float* out, int64_t count) {
  if constexpr (kWidth > 0) {
    store_lanes<kWidth>(out, load_lanes<kWidth>(in));
  } else if (count >= 4) {
    store_lanes<4>(out, load_lanes<4>(in));
    store_lanes<4>(out + count - 4, load_lanes<4>(in + count - 4));
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = in[i];
  }
}

template <int kWidth>
LW_INLINE void unfold_rows(const float* lanes, const FoldedJob& job, const Fold& fold, float* out, int64_t step) {
  for (int64_t g = 0, left = job.H; g < fold.parts && left > 0; ++g, left -= fold.rows) {
    const float* from = lanes + g * job.slot;
    for (int64_t t = 0; t < fold.rows && t < left; ++t, from += kLanes, out += step) {
      copy_short<kWidth>(from, out, job.W);
    }
  }
}

// The rows of one sample, from where the lanes hold them to y or through a pool.
LW_INLINE void unfold(const float* lanes, const FoldedJob& job, const Fold& fold, float bias, float* rows, float* y) {
  const int64_t pool = job.filters.pool, step = pool == 1 ? job.W : job.slot;
  float* to = pool == 1 ? y : rows;
  if (job.W == 8) unfold_rows<8>(lanes, job, fold, to, step);
  else if (job.W == 4) unfold_rows<4>(lanes, job, fold, to, step);
  else unfold_rows<0>(lanes, job, fold, to, step);
  if (pool > 1) finish_pool(rows, step, job.H, job.W, pool, bias, job.filters.relu, y);
}

// One filter's sums of a set.
LW_INLINE void folded_sums(const float* x, const KernelList& kernels, const FoldedJob& job, const Fold& fold,
                           SumsTile tile, SumsEnd end, int64_t sample_step) {
  if (fold.plane) {
    const int width = int(job.slot);
    if (fold.samples == 1) return sums_plane<1>(x, kernels, tile, width, end, sample_step);
    if (fold.samples == 2) return sums_plane<2>(x, kernels, tile, width, end, sample_step);
    return sums_plane<3>(x, kernels, tile, width, end, sample_step);
  }
  const bool padded = fold.parts > 1;
  float* out = end.out;
  for (int64_t tiles = count_tiles(fold.rows, 1), r = 0; tiles > 0; --tiles) {
    const int64_t rows = (fold.rows - r + tiles - 1) / tiles;
    tile.skip_top = !padded && r == 0;
    tile.skip_bottom = !padded && r + rows == fold.rows;
    end.out = out + r * kLanes;
    find_parts_tile(rows)(x + (r - (padded ? 0 : 1)) * kLanes, kernels, tile, end);
    r += rows;
  }
}

// Filters order[0 .. count) of a set of samples; y is where filter 0 of the first goes.
void folded_filters(const float* planes, const FoldedJob& job, const Fold& fold, const int32_t* order, int64_t count,
                 float* scratch, float* y, int64_t y_sample) {
  const KeptFilters& filters = job.filters;
  const int64_t pool = filters.pool, pixels = (job.H / pool) * (job.W / pool);
  SumsTile tile{};
  tile.row = kLanes;
  tile.plane = fold.stored() * kLanes;
  uint32_t starts = 0;
  for (int l = 0; l < kLanes; l += int(job.slot)) starts |= 1u << l;
  tile.joined_before = mask_from_bits(~starts & ((1u << kLanes) - 1));
  tile.joined_after = mask_from_bits(~(starts << (job.slot - 1)) & ((1u << kLanes) - 1));
  const bool direct = fold.plane && pool == 1 && job.W == job.slot;  // a vector begins with a whole plane
  const int64_t sample_lanes = fold.plane ? kLanes : fold.parts * job.slot;
  float* rows = scratch + fold.stored() * kLanes + kLanes;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t o = order[n];
    int64_t channel;
    const KernelList kernels = kernels_of(filters, o, channel);
    const float bias = filters.bias ? filters.bias[o] : 0.0f;
    float* to = y + o * pixels;
    const int lanes = direct ? int(pixels) : kLanes;
    SumsEnd end{direct ? to : scratch, kLanes, lanes, 0.0f, false};
    if (pool == 1) end.bias = bias, end.relu = filters.relu;
    folded_sums(planes + channel * tile.plane, kernels, job, fold, tile, end, direct ? y_sample : kLanes);
    for (int64_t s = 0; s < fold.samples && !direct; ++s) {
      unfold(scratch + s * sample_lanes, job, fold, bias, rows, to + s * y_sample);
    }
  }
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {
namespace {

struct FoldedSet {
  Fold fold;
  int64_t first;  // sample
};

// As many samples side by side as fit; those left over are divided into parts.
std::vector<FoldedSet> fold_samples(int64_t begin, int64_t end, int64_t height, int64_t slots) {
  std::vector<FoldedSet> sets;
  int64_t b = begin;
  for (; b + slots <= end; b += slots) sets.push_back({{slots, 1, height, false}, b});
  if (height <= slots && slots > 1) {
    for (int64_t some; b < end; b += some) {
      some = std::min<int64_t>(end - b, 3);
      sets.push_back({{some, slots, 1, true}, b});
    }
  }
  for (; b < end; ++b) sets.push_back({{1, slots, (height + slots - 1) / slots, false}, b});
  return sets;
}

struct FoldedRun {
  const KernelwiseConv& conv;
  FoldedJob job;
  int64_t lanes;
  std::vector<FoldedSet> sets;

  int64_t buffer_floats(int64_t i) const { return conv.sizes.C * sets[size_t(i)].fold.stored() * lanes; }
  int64_t scratch_floats() const { return (std::max<int64_t>(job.H, 3) + 4) * lanes + job.H * job.slot + kSlack; }

  void fill(int64_t i, int64_t begin, int64_t end, float* buffer) const {
    const FoldedSet& set = sets[size_t(i)];
    const int64_t pixels = job.H * job.W, sample = conv.sizes.C * pixels;
    const float* from = conv.x + set.first * sample + begin * pixels;
    LW_SELECT(fold_planes)(from, job, set.fold, sample, begin, end, buffer);
  }

  void filters(int64_t i, int64_t begin, int64_t end, const std::vector<int32_t>& order, const float* buffer,
               float* scratch) const {
    const FoldedSet& set = sets[size_t(i)];
    const int64_t sample = conv.sizes.filters * conv.out_pixels();
    float* y = conv.y + set.first * sample;
    LW_SELECT(folded_filters)(buffer, job, set.fold, order.data(), end - begin, scratch, y, sample);
  }
};

}  // namespace

bool prefer_folded(const ConvSizes& s, int64_t lanes) {
  return fits_sums(s) && s.W * 2 <= lanes && s.padding[0] == 1 && s.padding[1] == 1;
}

void run_folded(const KernelwiseConv& conv, int64_t begin, int64_t end) {
  const ConvSizes& s = conv.sizes;
  const int64_t lanes = cpu_lanes(), slot = s.W <= 4 ? 4 : 8;
  const FoldedRun run{conv, {conv.filters, s.H, s.W, slot}, lanes, fold_samples(begin, end, s.H, lanes / slot)};
  run_items(run, conv, 0, int64_t(run.sets.size()));
}

}  // namespace liveweight
#endif  // LW_BASE
