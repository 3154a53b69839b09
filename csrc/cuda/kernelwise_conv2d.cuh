// y = pool(act(conv2d(x, W) + b)) where whole 2-D kernels of W are missing: which kernel runs.
//
// Floor: one FFMA per kept weight and output, 128 a clock and multiprocessor, 33.5e12 a second on
// an H200. Shared memory gives 32 words a clock, so each word must feed four products to keep up: a
// patch of 8 x 4 outputs of a 3 x 3 kernel reads 10 x 6 words for 288 products, 4.8 a word, without
// meeting a bank twice. Compiled, that loop has 349 instructions (83 % FFMA; 7 x 4: 81 %, 4 x 4:
// 75 %, 5 x 5: 83 %). Where a word feeds fewer, shared memory bounds the kernel: 3 x 3 of stride 2
// at 40 % of the FFMA rate, 1 x 1 at 25 %. Around the loop, a 4-byte copy takes 5 to 7
// instructions; every pixel is copied once per 16 filters. Bytes matter only for small layers.
//
// Sums are fp32 for every element type and add up channels, rows and columns in this order whatever
// the plan is: every plan gives the same bits.
#pragma once

#include "kernelwise_conv2d_direct.cuh"
#include "kernelwise_conv2d_tile.cuh"
#include "kernelwise_conv2d_widen.cuh"

namespace liveweight::cuda::kernelwise {

// A 1 x 1 convolution does not care where rows end: rows of four pixels waste no lanes.
inline void fold_rows(Conv& c) {
  const int64_t pixels = int64_t(c.height) * c.width;
  const bool pointwise = c.kernel[0] * c.kernel[1] == 1 && c.stride[0] == 1 && c.stride[1] == 1 &&
                         c.padding[0] == 0 && c.padding[1] == 0;
  if (!pointwise || c.pool > 1 || pixels % kQuad || c.width == kQuad) return;
  c.height = c.out_height = int(pixels / kQuad);
  c.width = c.out_width = kQuad;
  c.x_stride[2] = kQuad * c.x_stride[3], c.y_stride[2] = kQuad * c.y_stride[3];
}

// Whether patches can go straight to y, 16 bytes at a time.
inline bool stores_quads(const Conv& c) {
  return c.element == Element::kFloat && c.pool == 1 && c.y_stride[3] == 1 &&
         c.out_width % kQuad == 0 && c.y_stride[2] % kQuad == 0 && c.y_stride[1] % kQuad == 0 &&
         c.y_stride[0] % kQuad == 0 && reinterpret_cast<uintptr_t>(c.y) % 16 == 0;
}

inline void launch_direct(const Conv& c, Launch launch) {
  const int64_t outputs = c.batch * c.pooled_height() * c.pooled_width();
  const int64_t filters = int64_t(c.group_filters) * c.groups;
  const int64_t work = divide_up(outputs, kDirectThreads * kDirectOutputs) * filters;
  const int64_t most = 0x7fffffff;
  launch(conv_direct, Shape{grid(work < most ? work : most), kDirectThreads}, c);
}

// Runs the tiled kernel if it suits the convolution and is not dearer than the direct one.
template <int K, int S, int... Rows>
bool run_tiled(Conv& c, Launch launch) {
  const auto all = [](const int (&pair)[2], int n) { return pair[0] == n && pair[1] == n; };
  if (!all(c.kernel, K) || !all(c.stride, S) || (K > 1 && !all(c.dilation, 1))) return false;
  TileChoice choice = remember_tile<Rows...>(c);
  if (choice.cost == kNoTile) return false;
  if (choice.cost > direct_cost(c) && wish.way != Wish::kTiled) return false;
  ConvTile& t = choice.tile;
  t.direct_store = stores_quads(c);
  const Shape shape{grid(t.blocks(c.groups)), t.warps * 32, t.shared};
  ((t.rows == Rows ? launch(conv_tile<K, S, Rows>, shape, c, t) : void()), ...);
  return true;
}

// Plans by the shapes alone and launches; y holds something.
inline void kernelwise_conv2d(Conv c, Launch launch) {
  if (c.kept > 0 && wish.way != Wish::kDirect) {
    fold_rows(c);
    if (run_tiled<3, 1, 8, 7, 4>(c, launch) || run_tiled<1, 1, 8, 7, 4>(c, launch) ||
        run_tiled<5, 1, 4>(c, launch) || run_tiled<3, 2, 4>(c, launch)) {
      return;
    }
  }
  launch_direct(c, launch);
}

}  // namespace liveweight::cuda::kernelwise
