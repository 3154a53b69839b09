// Packing of inputs for unstructured_conv2d: pad each channel, then deal it to lanes.
#include "four_lanes.h"
#include "unstructured_conv2d.h"
#include "unstructured_conv2d_pairs.h"

namespace liveweight::LW_ISA {

int tile_lanes() { return kLanes; }
int tile_outputs() { return kRegisters >= 32 ? kTileOutputs : kTileOutputs / 2; }

LW_INLINE void fill_zero(float* out, int64_t count) {
  for (; count >= kLanes; count -= kLanes, out += kLanes) {
    store(out, zero());
    asm volatile("");  // else this becomes a call of memset, slow for the few floats beside a row
  }
  if (count > 0) store_first(out, zero(), int(count));
}

constexpr int kAhead = 1024;  // floats that are fetched ahead of a copy

// out[i] = in[i * step]
LW_INLINE void copy_row(const float* in, int64_t step, float* out, int64_t count) {
  if (step == 1) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      prefetch(in + i + kAhead);
      store(out + i, load(in + i));
    }
    if (i < count) store_first(out + i, load_first(in + i, int(count - i)), int(count - i));
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = in[i * step];
  }
}

// First index i >= 0 with i * step + from >= limit.
LW_INLINE int64_t first_at(int64_t limit, int64_t step, int64_t from) {
  return from >= limit ? 0 : (limit - from + step - 1) / step;
}

// Copies one channel of one sample to where it lies in a padded picture, columns sorted by phase. What
// is outside is never written: zeros stay there from channel to channel.
LW_INLINE void pad_picture(const float* x, const PackPlan& p, float* out) {
  const int64_t top = p.origin[0] < 0 ? -p.origin[0] : 0;
  const int64_t bottom = first_at(p.height, 1, p.origin[0]);
  for (int64_t i = 0; i < p.phases; ++i) {
    const int64_t from = p.phase[i] + p.origin[1], left = first_at(0, p.stride[1], from);
    int64_t right = first_at(p.width, p.stride[1], from);
    if (right > p.pad_width) right = p.pad_width;
    const float* row = x + (top + p.origin[0]) * p.strides.row + (left * p.stride[1] + from) * p.strides.column;
    float* to = out + (top * p.phases + i) * p.pad_width + left;
    for (int64_t r = top; r < bottom && r < p.pad_rows; ++r, row += p.strides.row, to += p.phases * p.pad_width) {
      copy_row(row, p.stride[1] * p.strides.column, to, right - left);
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

// Each lane holds two outputs of a row: even and odd columns of the rows of all its neighbours. Writes up
// to one vector past the last row.
LW_INLINE void deal_pairs(const float* scratch, int64_t picture, const PackPlan& p, float* out) {
  const float* half[4];
  for (int i = 0; i < 4; ++i) {
    const int64_t lane = i * (kLanes / 4), row = lane / p.grid.columns;
    half[i] = scratch + row / p.grid.rows * picture +
              row % p.grid.rows * (p.out_rows * p.stride[0] * p.pad_width) + lane % p.grid.columns * 2;
  }
  const bool whole = p.grid.columns * 2 >= kLanes;
  int64_t from = 0;
  for (int64_t r = 0; r < p.rows; ++r, from += p.pad_width, out += p.phase_width * kLanes) {
    for (int64_t c = 0; c < p.phase_width; c += 2) {
      const int64_t at = from + c;
      Vec even, odd;
      if (whole) split_pairs(load(half[0] + at), load(half[2] + at), even, odd);
      else split_pairs(load_halves(half[0] + at, half[1] + at), load_halves(half[2] + at, half[3] + at), even, odd);
      store(out + c * kLanes, even);
      store(out + (c + 1) * kLanes, odd);
    }
  }
}

// Each lane reads its block; writes up to 3 vectors past the last row.
LW_INLINE void deal_blocks(const float* scratch, int64_t picture, const PackPlan& p, float* out) {
  const float* lanes[kLanes];
  int lane = 0;
  for (int64_t s = 0; s < p.grid.samples; ++s) {
    for (int64_t i = 0; i < p.grid.rows; ++i) {
      const float* row = scratch + s * picture + i * p.out_rows * p.stride[0] * p.phases * p.pad_width;
      for (int64_t j = 0; j < p.grid.columns; ++j) lanes[lane++] = row + j * p.out_columns;
    }
  }
  int64_t from = 0;
  for (int64_t r = 0; r < p.rows * p.phases; ++r, from += p.pad_width, out += p.phase_width * kLanes) {
    for (int64_t c = 0; c < p.phase_width; c += 4) {
      Four v;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) set_quarter(v, i, lanes[i] + from + c);
      transpose_four(v);
      for (int i = 0; i < 4; ++i) store(out + (c + i) * kLanes, v.row[i]);
    }
  }
}

// Lanes are samples, which lie side by side in x: nothing to deal, only to pad.
LW_INLINE void pad_samples(const float* x, const PackPlan& p, int64_t samples, float* out) {
  const int64_t step = p.stride[1] * p.strides.column;
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t row = r + p.origin[0];
    const bool inside = row >= 0 && row < p.height;
    for (int64_t i = 0; i < p.phases; ++i, out += p.phase_width * kLanes) {
      const int64_t start = p.phase[i] + p.origin[1];
      int64_t left = first_at(0, p.stride[1], start), right = first_at(p.width, p.stride[1], start);
      if (left > p.phase_width || !inside) left = p.phase_width;
      if (right > p.phase_width || !inside) right = p.phase_width;
      const float* from = x + row * p.strides.row + start * p.strides.column;
      for (int64_t c = 0; c < left; ++c) store(out + c * kLanes, zero());
      if (samples == kLanes) {
        for (int64_t c = left; c < right; ++c) store(out + c * kLanes, load(from + c * step));
      } else {
        for (int64_t c = left; c < right; ++c) store(out + c * kLanes, load_first(from + c * step, int(samples)));
      }
      for (int64_t c = right; c < p.phase_width; ++c) store(out + c * kLanes, zero());
    }
  }
}

// Channels [begin, end) of `samples` samples, fewer than the grid's or as many. A few channels are
// padded in scratch, then dealt: reading right after writing would wait for the writes.
void tile_pack(const float* x, const TileJob& job, int64_t samples, int64_t begin, int64_t end,
               float* scratch, float* packed) {
  const PackPlan& p = job.pack;
  if (p.grid.samples == kLanes && p.strides.sample == 1) {
    for (int64_t c = begin; c < end; ++c) {
      pad_samples(x + c * p.strides.channel, p, samples, packed + c * p.plane);
    }
    return;
  }
  const bool bare = p.origin[0] == 0 && p.origin[1] == 0 && p.stride[1] == 1 && p.phase_width == p.out_columns;
  if (job.chained && bare && p.height == 1) {
    const int64_t room = p.out_columns * kLanes, count = p.width < room ? p.width : room;
    for (int64_t c = begin; c < end; ++c) {
      float* out = packed + c * p.plane;
      copy_row(x + c * p.strides.channel, p.strides.column, out, count);
      fill_zero(out + count, room - count);
    }
    return;
  }
  const int64_t picture = p.pad_rows * p.phases * p.pad_width, size = p.grid.samples * picture;
  fill_zero(scratch, p.together * size + kLanes);
  for (int64_t c = begin; c < end; c += p.together) {
    const int64_t count = end - c < p.together ? end - c : p.together;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t s = 0; s < samples; ++s) {
        pad_picture(x + s * p.strides.sample + (c + i) * p.strides.channel, p, scratch + i * size + s * picture);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      if (p.paired) deal_pairs(scratch + i * size, picture, p, packed + (c + i) * p.plane);
      else if (p.interleaved) deal_neighbours(scratch + i * size, p, packed + (c + i) * p.plane);
      else deal_blocks(scratch + i * size, picture, p, packed + (c + i) * p.plane);
    }
  }
}

}  // namespace liveweight::LW_ISA
