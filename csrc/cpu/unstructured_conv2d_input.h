// What the launchers of unstructured convolutions check, and how they describe their input.
#pragma once

#include "conv2d.h"
#include "unstructured_conv2d.h"

#ifdef LW_BASE
#include <algorithm>
#include <vector>

namespace liveweight {

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

}  // namespace liveweight
#endif  // LW_BASE
