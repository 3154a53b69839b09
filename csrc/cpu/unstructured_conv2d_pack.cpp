// Packing of inputs for unstructured_conv2d: pad each channel, then deal it to lanes.
#include "unstructured_conv2d.h"

namespace liveweight::LW_ISA {

int tile_lanes() { return kLanes; }

LW_INLINE void fill_zero(float* out, int64_t count) {
  for (; count >= kLanes; count -= kLanes, out += kLanes) {
    store(out, zero());
    asm volatile("");  // else this becomes a call of memset, slow for the few floats beside a row
  }
  if (count > 0) store_first(out, zero(), int(count));
}

// out[i] = in[i * step]
LW_INLINE void copy_row(const float* in, int64_t step, float* out, int64_t count) {
  if (step == 1) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, load(in + i));
    if (i < count) store_first(out + i, load_first(in + i, int(count - i)), int(count - i));
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = in[i * step];
  }
}

// First index i >= 0 with i * step + from >= limit.
LW_INLINE int64_t first_at(int64_t limit, int64_t step, int64_t from) {
  return from >= limit ? 0 : (limit - from + step - 1) / step;
}

// One channel of one sample with zeros around it, columns sorted by phase.
LW_INLINE void pad_picture(const float* x, const PackPlan& p, float* out) {
  for (int64_t r = 0; r < p.pad_rows; ++r) {
    const int64_t row = r + p.origin[0];
    for (int64_t i = 0; i < p.phases; ++i, out += p.pad_width) {
      if (row < 0 || row >= p.height) {
        fill_zero(out, p.pad_width);
        continue;
      }
      const int64_t from = p.phase[i] + p.origin[1];
      int64_t right = first_at(p.width, p.stride[1], from);
      if (right > p.pad_width) right = p.pad_width;
      int64_t left = first_at(0, p.stride[1], from);
      if (left > right) left = right;
      fill_zero(out, left);
      copy_row(x + row * p.strides.row + (left * p.stride[1] + from) * p.strides.column,
               p.stride[1] * p.strides.column, out + left, right - left);
      fill_zero(out + right, p.pad_width - right);
    }
  }
}

// Vectors at base + offset, base + offset + step, ...: where lanes hold neighbours.
LW_INLINE void deal_neighbours(const float* base, const PackPlan& p, float* out) {
  const int64_t step = p.out_columns > 1 ? kLanes : 1;
  for (int64_t r = 0; r < p.rows * p.phases; ++r, base += p.pad_width) {
    for (int64_t c = 0; c < p.phase_width; ++c, out += kLanes) store(out, load(base + c * step));
  }
}

// Lane l reads from lanes[l]; writes up to 3 vectors past the last row.
LW_INLINE void deal_blocks(const float* const* lanes, const PackPlan& p, float* out) {
  int64_t from = 0;
  for (int64_t r = 0; r < p.rows * p.phases; ++r, from += p.pad_width, out += p.phase_width * kLanes) {
    for (int64_t c = 0; c < p.phase_width; c += 4) {
#pragma GCC unroll 4
      for (int g = 0; g < kLanes; g += 4) {
        Lanes<4> v[4];
        for (int i = 0; i < 4; ++i) v[i] = load_lanes<4>(lanes[g + i] + from + c);
        transpose4(v);
        for (int i = 0; i < 4; ++i) store_lanes<4>(out + (c + i) * kLanes + g, v[i]);
      }
    }
  }
}

// Lanes are samples, which lie side by side in x: nothing to deal, only to pad.
LW_INLINE void pad_samples(const float* x, const PackPlan& p, int64_t samples, float* out) {
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t row = r + p.origin[0];
    for (int64_t i = 0; i < p.phases; ++i) {
      for (int64_t c = 0; c < p.phase_width; ++c, out += kLanes) {
        const int64_t column = c * p.stride[1] + p.phase[i] + p.origin[1];
        const bool inside = row >= 0 && row < p.height && column >= 0 && column < p.width;
        const float* from = x + row * p.strides.row + column * p.strides.column;
        store(out, inside ? load_first(from, int(samples)) : zero());
      }
    }
  }
}

// Channels [begin, end) of `samples` samples, fewer than the grid's or as many. The packed rows of a
// channel lie in scratch as long as lanes need them.
void tile_pack(const float* x, const TileJob& job, int64_t samples, int64_t begin, int64_t end,
               float* scratch, float* packed) {
  const PackPlan& p = job.pack;
  if (p.grid.samples == kLanes && p.strides.sample == 1) {
    for (int64_t c = begin; c < end; ++c) {
      pad_samples(x + c * p.strides.channel, p, samples, packed + c * p.plane);
    }
    return;
  }
  const int64_t picture = p.pad_rows * p.phases * p.pad_width;
  const float* lanes[kLanes];
  int lane = 0;
  for (int64_t s = 0; s < p.grid.samples; ++s) {
    for (int64_t i = 0; i < p.grid.rows; ++i) {
      const float* row = scratch + s * picture + i * p.out_rows * p.stride[0] * p.phases * p.pad_width;
      for (int64_t j = 0; j < p.grid.columns; ++j) lanes[lane++] = row + j * p.out_columns;
    }
  }
  fill_zero(scratch + samples * picture, (p.grid.samples - samples) * picture + 4);
  for (int64_t c = begin; c < end; ++c) {
    for (int64_t s = 0; s < samples; ++s) {
      pad_picture(x + s * p.strides.sample + c * p.strides.channel, p, scratch + s * picture);
    }
    float* out = packed + c * p.plane;
    if (p.interleaved) deal_neighbours(scratch, p, out);
    else deal_blocks(lanes, p, out);
  }
}

}  // namespace liveweight::LW_ISA
