// How pictures [B, C, H, W] lie in memory, and turning one layout into another.
//
// contiguous: sample, channel, row, column. channels_last: sample, row, column, channel.
// batch_last: channel, row, column, sample. Shapes are the same; only strides differ.
#pragma once

#include "dispatch.h"
#include "lanes.h"

namespace liveweight {

enum class Layout : int64_t { contiguous = 0, channels_last = 1, batch_last = 2 };

}  // namespace liveweight

namespace liveweight::LW_ISA {

// Four rows and columns [begin, end) of transpose_rows.
LW_INLINE void transpose_strip(const float* in, int64_t in_step, float* out, int64_t out_step, int64_t begin,
                               int64_t end) {
  int64_t c = begin;
  for (; c + 4 <= end; c += 4) {
    Lanes<4> v[4];
    for (int i = 0; i < 4; ++i) v[i] = load_lanes<4>(in + i * in_step + c);
    transpose4(v);
    for (int i = 0; i < 4; ++i) store_lanes<4>(out + (c + i) * out_step, v[i]);
  }
  for (; c < end; ++c) {
    for (int i = 0; i < 4; ++i) out[c * out_step + i] = in[i * in_step + c];
  }
}

// out[c * out_step + r] = in[r * in_step + c] for r < rows, c < columns. The side with the longer steps
// is read or written a whole line at a time: lines far apart may share a place in the cache.
LW_INLINE void transpose_rows(const float* in, int64_t in_step, float* out, int64_t out_step,
                              int64_t rows, int64_t columns) {
  constexpr int64_t kLine = 16;
  const bool whole_lines_out = out_step > in_step;
  const int64_t row_block = whole_lines_out ? kLine : rows, column_block = whole_lines_out ? 4 : kLine;
  for (int64_t r0 = 0; r0 < rows; r0 += row_block) {
    const int64_t r1 = r0 + row_block < rows ? r0 + row_block : rows;
    for (int64_t c0 = 0; c0 < columns; c0 += column_block) {
      const int64_t c1 = c0 + column_block < columns ? c0 + column_block : columns;
      int64_t r = r0;
      for (; r + 4 <= r1; r += 4) transpose_strip(in + r * in_step, in_step, out + r, out_step, c0, c1);
      for (; r < r1; ++r) {
        for (int64_t c = c0; c < c1; ++c) out[c * out_step + r] = in[r * in_step + c];
      }
    }
  }
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace liveweight {

// Sizes of a picture tensor in the order of its layout, and where each stands in [B, C, H, W].
inline constexpr int kLayoutOrder[3][4] = {{0, 1, 2, 3}, {0, 2, 3, 1}, {1, 2, 3, 0}};

// Data of a picture [B, C, H, W] of T on the CPU and the first layout that fits its strides; throws where
// none does.
template <class T = float>
const T* checked_picture(const char* op, const char* name, const Tensor& x, Layout& layout,
                         ScalarType type = ScalarType::Float) {
  LW_CHECK(x.is_cpu() && x.dim() == 4 && x.scalar_type() == type, op, ": expected ", name, " [B, C, H, W] ",
           type == ScalarType::Float ? "float32" : torch::headeronly::toString(type), " on the CPU, got ",
           torch::headeronly::toString(x.scalar_type()), " ", shape_of(x));
  for (int kind = 0; kind < 3; ++kind) {
    int64_t expected = 1;
    bool fits = true;
    for (int i = 3; i >= 0; --i) {
      const int d = kLayoutOrder[kind][i];
      fits &= x.size(d) == 1 || x.stride(d) == expected;
      expected *= x.size(d);
    }
    if (!fits && expected != 0) continue;
    layout = Layout(kind);
    return static_cast<const T*>(x.const_data_ptr());
  }
  raise<std::runtime_error>(op, ": expected ", name, " contiguous, channels last or batch last");
}

// A picture tensor of that layout, uninitialised, like `like` in dtype and device.
inline Tensor new_picture(const Tensor& like, const int64_t (&sizes)[4], Layout layout) {
  int64_t strides[4], step = 1;
  for (int i = 3; i >= 0; --i) {
    const int d = kLayoutOrder[int(layout)][i];
    strides[d] = step;
    step *= sizes[d] > 0 ? sizes[d] : 1;
  }
  int32_t dtype, device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, sizes, strides, dtype, device, like.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace liveweight
#endif  // LW_BASE
