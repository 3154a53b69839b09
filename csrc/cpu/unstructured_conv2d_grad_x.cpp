// Gradient of an unstructured convolution to x, at sparse cost.
//
// The engine of forward (unstructured_conv2d.h) over output gradients, with the weight's tiles
// transposed. Each phase of the stride is a convolution of its own, with the taps that read it.
#include "unstructured_conv2d_run.h"

#ifdef LW_BASE
namespace liveweight {
namespace {

// The taps that reach rows (or columns) phase, phase + stride, ... of x, and the offset of the output
// that each belongs to.
struct PhaseTaps {
  std::vector<int64_t> tap, offset;
  int64_t origin = 0;

  PhaseTaps(const ConvSizes& s, int d, int64_t phase) {
    for (int64_t i = 0; i < s.kernel[d]; ++i) {
      const int64_t distance = phase + s.padding[d] - i * s.dilation[d];
      if (distance % s.stride[d] != 0) continue;
      tap.push_back(i);
      offset.push_back(distance / s.stride[d]);
    }
    if (!offset.empty()) origin = *std::min_element(offset.begin(), offset.end());
    for (int64_t& at : offset) at -= origin;
  }
};

// Which filter, channel (of x) and tap an entry of the weight has; use(o, c, tap, place) for each.
template <class Index, class Use>
void visit_entries(const ConvSizes& s, const SparseTiles& w, const Use& use) {
  const int64_t taps = s.kernel[0] * s.kernel[1], group_filters = std::max<int64_t>(s.filters / s.groups, 1);
  const Index* columns = static_cast<const Index*>(w.columns);
  const Index* segments = static_cast<const Index*>(w.segments);
  std::vector<int32_t> channel_of(size_t(std::max<int64_t>(w.channels * taps, 256))), tap_of(channel_of.size());
  for (size_t i = 0; i < channel_of.size(); ++i) {
    channel_of[i] = int32_t(int64_t(i) / taps), tap_of[i] = int32_t(int64_t(i) % taps);
  }
  for (int64_t g = 0; g < w.blocks * w.parts; ++g) {
    int64_t at = w.offsets[2 * g];
    for (int64_t i = w.offsets[2 * g + 1]; i < w.offsets[2 * g + 3]; ++i) {
      const int64_t o = g / w.parts * w.rows + segments[2 * i];
      const int64_t end = std::min<int64_t>(at + segments[2 * i + 1] + 1, w.offsets[2 * g + 2]);
      const int64_t first = o / group_filters * (s.C / s.groups) + g % w.parts * w.channels;
      for (; at < end; ++at) {
        const int64_t c = first + channel_of[size_t(columns[at])];
        if (o < s.filters && c < s.C) use(o, c, tap_of[size_t(columns[at])], at);
      }
    }
  }
}

// The weight of one phase, transposed: by channel of x, tiles over filters.
template <class Index>
struct Transposed {
  std::vector<float> values;
  std::vector<Index> columns, segments;
  std::vector<int32_t> offsets;
  SparseTiles tiles{};

  // number[tap]: the tap's number in this phase, -1 where it has none; taps: how many have one.
  Transposed(const ConvSizes& s, const SparseTiles& w, const std::vector<int64_t>& number, int64_t taps,
             int64_t tile_channels) {
    const int64_t group_filters = std::max<int64_t>(s.filters / s.groups, 1);
    tiles.wide = sizeof(Index) > 1;
    tiles.rows = 64, tiles.channels = tile_channels;
    tiles.blocks = (s.C + tiles.rows - 1) / tiles.rows;
    tiles.parts = (group_filters + tile_channels - 1) / tile_channels;
    std::vector<int32_t> place(size_t(s.C * tiles.parts) + 1);  // of each channel's run in each tile
    const auto run_of = [&](int64_t o, int64_t c) {
      return size_t(c * tiles.parts + o % group_filters / tile_channels);
    };
    const auto visit = [&](const auto& use) {
      if (w.wide) visit_entries<int16_t>(s, w, use);
      else visit_entries<uint8_t>(s, w, use);
    };
    visit([&](int64_t o, int64_t c, int64_t tap, int64_t) { place[run_of(o, c)] += number[size_t(tap)] >= 0; });
    lay_out_runs(s.C, place);
    visit([&](int64_t o, int64_t c, int64_t tap, int64_t at) {
      if (number[size_t(tap)] < 0) return;
      const size_t to = size_t(place[run_of(o, c)]++);
      values[to] = w.values[at];
      columns[to] = Index(o % group_filters % tile_channels * taps + number[size_t(tap)]);
    });
    tiles.values = values.data(), tiles.columns = columns.data();
    tiles.segments = segments.data(), tiles.offsets = offsets.data();
  }

 private:
  // Turns the lengths of runs into their places, tile after tile, the longest first.
  void lay_out_runs(int64_t channels, std::vector<int32_t>& place) {
    int32_t total = 0;
    std::vector<std::pair<int32_t, int64_t>> rows;  // length, row
    offsets = {0, 0};
    for (int64_t g = 0; g < tiles.blocks * tiles.parts; ++g) {
      const int64_t first = g / tiles.parts * tiles.rows;
      const auto length = [&](int64_t row) -> int32_t& {
        return place[size_t((first + row) * tiles.parts + g % tiles.parts)];
      };
      rows.clear();
      for (int64_t row = 0; row < std::min(tiles.rows, channels - first); ++row) {
        if (length(row) > 0) rows.push_back({length(row), row});
      }
      std::stable_sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
      for (const auto& [count, row] : rows) {
        segments.push_back(Index(row)), segments.push_back(Index(count - 1));
        length(row) = total;
        total += count;
      }
      offsets.push_back(total), offsets.push_back(int32_t(segments.size() / 2));
    }
    values.resize(size_t(total)), columns.resize(size_t(total));
  }
};

struct GradX {
  ConvSizes sizes;
  SparseTiles weight;
  const float* grad;
  PlaneStrides strides;
  float* x;

  // Gradient of one phase; leaves x alone where no tap reads the phase.
  void run(int64_t a, int64_t b) const {
    const ConvSizes& s = sizes;
    const PhaseTaps rows(s, 0, a), columns(s, 1, b);
    const int64_t taps = int64_t(rows.tap.size() * columns.tap.size());
    if (taps == 0 || a >= s.H || b >= s.W) return;
    TileInput input{grad, s.B, s.filters, s.height, s.width, strides, {rows.origin, columns.origin}, {1, 1}, {}, {}};
    std::vector<int64_t> number(size_t(s.kernel[0] * s.kernel[1]), -1);
    for (size_t i = 0; i < rows.tap.size(); ++i) {
      for (size_t j = 0; j < columns.tap.size(); ++j) {
        number[size_t(rows.tap[i] * s.kernel[1] + columns.tap[j])] = int64_t(input.tap_row.size());
        input.tap_row.push_back(rows.offset[i]);
        input.tap_column.push_back(columns.offset[j]);
      }
    }
    const OutPlan out{(s.H - a + s.stride[0] - 1) / s.stride[0], (s.W - b + s.stride[1] - 1) / s.stride[1],
                      {s.C * s.H * s.W, s.H * s.W, s.stride[0] * s.W, s.stride[1]}};
    // As many filters as the first-level cache has room for, like formats.UnstructuredKernels.
    const int64_t lines = (largest(input.tap_row) + 2) * (largest(input.tap_column) + 4);
    const int64_t channels = std::max<int64_t>(std::min(480 / lines, 256 / taps), 1);
    const auto convolve = [&](const auto& transposed) {
      TileConv(input, out, transposed.tiles, s.C, s.groups, nullptr, false).run(x + a * s.W + b);
    };
    if (channels * taps <= 256) convolve(Transposed<uint8_t>(s, weight, number, taps, channels));
    else convolve(Transposed<int16_t>(s, weight, number, taps, channels));
  }
};

Tensor unstructured_conv2d_grad_x(const Tensor& grad, const Tensor& values, const Tensor& columns,
                                  const Tensor& segments, const Tensor& offsets, std::vector<int64_t> shape,
                                  std::vector<int64_t> tile, std::vector<int64_t> x_shape,
                                  std::vector<int64_t> stride, std::vector<int64_t> padding,
                                  std::vector<int64_t> dilation, int64_t groups) {
  const char* op = "unstructured_conv2d_grad_x";
  GradX task{};
  const float* data = checked_data<float>(op, "values", values, 1, ScalarType::Float);
  task.weight = check_tiles(op, data, values.numel(), columns, segments, offsets, shape, tile);
  const ConvSizes s = task.sizes =
      conv_sizes(op, x_shape, shape[0], {shape[2], shape[3]}, stride, padding, dilation, groups);
  LW_CHECK(s.C == shape[1] * groups, op, ": expected ", shape[1] * groups, " channels, got ", s.C);
  task.grad = check_planes(op, "grad", grad, {s.B, s.filters, s.height, s.width});
  task.strides = strides_of(grad);
  // Columns and rows that no tap reads stay 0.
  Tensor out = torch::stable::new_zeros(grad, {s.B, s.C, s.H, s.W});
  task.x = static_cast<float*>(out.mutable_data_ptr());
  if (out.numel() == 0) return out;
  for (int64_t a = 0; a < s.stride[0]; ++a) {
    for (int64_t b = 0; b < s.stride[1]; ++b) task.run(a, b);
  }
  return out;
}

}  // namespace
}  // namespace liveweight

STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) {
  m.impl("unstructured_conv2d_grad_x", TORCH_BOX(&liveweight::unstructured_conv2d_grad_x));
}
#endif  // LW_BASE
