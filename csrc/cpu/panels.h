// A batch as panels: up to 64 samples of x [M, K] turned to [K, width], samples side by side.
//
// One weight then meets all samples of the panel in a few vectors. A panel is 4, 8, 16, 32 or 64
// wide; lanes without a sample hold zeros.
#pragma once

#include "lanes.h"

namespace liveweight {

struct Panel {
  int64_t first;  // first sample
  int count;      // samples in it
  int width;      // count rounded up to 4, 8, 16, 32 or 64
};

}  // namespace liveweight

namespace liveweight::LW_ISA {

// Columns [begin, end) of `count` rows of x (row length K) into rows of the panel.
LW_INLINE void fill_panel(const float* x, int64_t K, int count, int width, int64_t begin, int64_t end,
                          float* panel) {
  constexpr int64_t kBlock = 64;  // rows of the panel written before the next four samples
  for (int64_t k0 = begin; k0 < end; k0 += kBlock) {
    const int64_t k1 = k0 + kBlock < end ? k0 + kBlock : end;
    int m = 0;
    for (; m + 4 <= count; m += 4) {
      const float* row = x + m * K;
      int64_t k = k0;
      for (; k + 4 <= k1; k += 4) {
        Lanes<4> v[4];
        for (int i = 0; i < 4; ++i) v[i] = load_lanes<4>(row + i * K + k);
        transpose4(v);
        for (int i = 0; i < 4; ++i) store_lanes<4>(panel + (k + i) * width + m, v[i]);
      }
      for (; k < k1; ++k) {
        for (int i = 0; i < 4; ++i) panel[k * width + m + i] = row[i * K + k];
      }
    }
    for (; m < count; ++m) {
      for (int64_t k = k0; k < k1; ++k) panel[k * width + m] = x[m * K + k];
    }
    for (; m < width; ++m) {
      for (int64_t k = k0; k < k1; ++k) panel[k * width + m] = 0.0f;
    }
  }
}

// Rows of a panel to columns: out[m * step + r] = panel[r * width + m] for the samples m.
LW_INLINE void empty_panel(const float* panel, int width, int samples, int rows, float* out, int64_t step) {
  int m = 0;
  for (; m + 4 <= samples; m += 4) {
    float* to = out + m * step;
    int r = 0;
    for (; r + 4 <= rows; r += 4) {
      Lanes<4> v[4];
      for (int i = 0; i < 4; ++i) v[i] = load_lanes<4>(panel + (r + i) * width + m);
      transpose4(v);
      for (int i = 0; i < 4; ++i) store_lanes<4>(to + i * step + r, v[i]);
    }
    for (; r < rows; ++r) {
      for (int i = 0; i < 4; ++i) to[i * step + r] = panel[r * width + m + i];
    }
  }
  for (; m < samples; ++m) {
    for (int r = 0; r < rows; ++r) out[m * step + r] = panel[r * width + m];
  }
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
#include <algorithm>
#include <vector>

namespace liveweight {

// Panels for samples [begin, end), each at least `least` wide.
inline std::vector<Panel> split_panels(int64_t begin, int64_t end, int least) {
  std::vector<Panel> panels;
  while (begin < end) {
    const int64_t left = end - begin;
    int width = 64;
    while (width > least && left <= width / 2) width /= 2;
    // 33 to 48 samples: 32, then the rest, rather than 64 lanes of which a third is empty.
    if (width > least && left < width && left <= width * 3 / 4) width /= 2;
    const int count = int(std::min<int64_t>(left, width));
    panels.push_back({begin, count, width});
    begin += count;
  }
  return panels;
}

}  // namespace liveweight
#endif  // LW_BASE
