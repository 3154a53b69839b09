// What both gradients of unstructured_linear share: the tiled pattern as raw pointers, its checks,
// and the batch as panels.
//
// A panel holds up to 64 samples of a matrix [M, C] as rows [C, width]. All panels but the last are
// equally wide; lanes without a sample hold zeros.
#pragma once

#include "unstructured_linear.h"

namespace liveweight {

// One group of the pattern: the entries of up to 256 rows in one tile of columns.
struct Group {
  const void* columns;   // of the first entry; uint8 or, where wide, uint16
  const void* segments;  // pairs (row, entries - 1) of the same type
  const float* values;
  int32_t count;  // of segments
  bool wide;
};

}  // namespace liveweight

LW_DECLARE(void grad_fill(const float* from, int64_t columns, int samples, int width, float* panel))
LW_DECLARE(void grad_x_group(const float* grad, int width, Group group, float* sums))
LW_DECLARE(void grad_x_store(const float* sums, int width, int samples, int64_t columns, float* out,
                             int64_t stride))
LW_DECLARE(void grad_values_group(const float* grad, const float* x, int width, Group group, bool add,
                                  float* out))

#ifdef LW_BASE
#include <algorithm>

namespace liveweight {

// The groups of a pattern, and lengths of panels in which every number of a byte lies inside.
struct Groups {
  Tiles tiles;

  int64_t count() const { return tiles.along * tiles.blocks; }
  Group operator[](int64_t g) const {
    const int64_t entry = tiles.offsets[2 * g], segment = tiles.offsets[2 * g + 1];
    const int64_t size = tiles.wide ? 2 : 1;
    return {static_cast<const char*>(tiles.places) + entry * size,
            static_cast<const char*>(tiles.segments) + 2 * segment * size, static_cast<const float*>(tiles.values) + entry,
            tiles.offsets[2 * g + 3] - int32_t(segment), tiles.wide};
  }
  int64_t padded_rows() const { return tiles.blocks * tiles.rows + 256; }
  int64_t padded_columns() const { return tiles.along * tiles.columns + 256; }
  int64_t padded_tile() const { return std::max<int64_t>(tiles.columns, 256); }
};

// Guards memory: numbers of two bytes must stay inside their tile.
inline Groups check_groups(const char* op, const Tensor& values, const Tensor& columns,
                           const Tensor& segments, const Tensor& offsets,
                           const std::vector<int64_t>& tile, int64_t N, int64_t K) {
  const Tiles w = check_tiles(op, values, columns, segments, offsets, tile, N, K);
  if (w.wide) {
    const uint16_t* place = static_cast<const uint16_t*>(w.places);
    bool inside = true;
    for (int64_t i = 0; i < columns.numel(); ++i) inside &= place[i] < w.columns;
    LW_CHECK(inside, op, ": columns must be in [0, ", w.columns, ")");
  }
  return {w};
}

// Units of work a thread takes at least: all of them where waking others costs more than it saves.
inline int64_t grain_for(double work, int64_t units) {
  return threads_for(work) > 1 ? 1 : std::max<int64_t>(units, 1);
}

// Samples that go through the pattern together: their panels of one group fit the second-level
// cache, and a byte of the pattern read from afar serves them all.
constexpr int64_t kSamplesAtOnce = 256;

// Widest panel: rows of 64 samples while vectors are many and a tile of them stays near.
inline int widest_panel(int64_t tile) {
  int width = cpu_isa() == Isa::avx512 ? 64 : 32;
  while (width > 16 && tile * width > 64 * 256) width /= 2;
  return width;
}

class Panels {
 public:
  // Samples [first, first + samples) of from [M, columns]; the buffer has `rows` >= columns rows.
  Panels(const float* from, int64_t columns, int64_t rows, int64_t samples, int widest, int64_t grain)
      : rows_(rows), samples_(samples), widest_(widest), data_(rows * lanes()) {
    parallel_for(count(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        LW_SELECT(grad_fill)(from + i * widest_ * columns, columns, filled(i), width(i), at(i));
        // Numbers past the matrix occur in broken patterns only; they read zeros.
        std::fill(at(i) + columns * width(i), at(i) + rows_ * width(i), 0.0f);
      }
    });
  }
  int64_t count() const { return (samples_ + widest_ - 1) / widest_; }
  int filled(int64_t i) const { return int(std::min<int64_t>(widest_, samples_ - i * widest_)); }
  int width(int64_t i) const {
    int width = widest_;
    while (width > 16 && filled(i) <= width / 2) width /= 2;
    return width;
  }
  float* at(int64_t i) { return data_.data() + rows_ * widest_ * i; }
  // Lanes of all panels together.
  int64_t lanes() const { return (count() - 1) * widest_ + width(count() - 1); }

 private:
  int64_t rows_, samples_;
  int widest_;
  Workspace<float> data_;
};

}  // namespace liveweight
#endif  // LW_BASE
