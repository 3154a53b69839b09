// The sum of block_linear for many samples: samples in vectors, weights as broadcasts.
//
// A tile of 8 rows of W (4 where registers are few) x up to 3 vectors of samples stays in registers, so
// that every vector of x and every weight serves several multiply-adds. A row of blocks is passed in
// pieces of kPiece weights: the second rows of the blocks, and the next samples, find weights and x in
// the first-level cache. Sums wait in scratch between pieces.
#include "activation.h"
#include "block_linear.h"
#include "layout.h"

LW_DECLARE(int block_panel_width(int64_t left, int bh))
LW_DECLARE(void block_panel_row(const BlockWeight& w, const BlockGroup* groups, int count, int64_t n,
                                const BlockOutput& out, float* scratch))

namespace liveweight::LW_ISA {

constexpr int kMostRows = kRegisters == 32 ? 8 : 4;
constexpr int kMostVectors = 3;

// Samples of the next group with samples in vectors; 0 where rows in vectors are better.
int block_panel_width(int64_t left, int bh) {
  constexpr int64_t kSpare = kLanes * 5 / 8;  // lanes without a sample that still pay
  if (bh % 4 != 0 || left < 2 * kLanes - kSpare) return 0;
  const bool three = left >= 5 * kLanes - kSpare || (left >= 3 * kLanes - kSpare && left < 4 * kLanes - kSpare);
  return (three ? 3 : 2) * kLanes;
}

// One pass over a piece: some rows of every block for one group of samples.
struct PanelPass {
  const float* values;  // first block of the piece, at the first row of the pass
  const int32_t* columns;
  int64_t count, size, height;  // blocks, floats of one, floats of a column of one
  const float* x;
  int64_t step;
  int width;        // columns of a block
  float* sums;      // [rows][samples]
  bool fresh;       // sums start at zero
  const char* next;  // what the next pieces will read; this pass asks for `lines` lines a block
  int lines;
};

template <int kRows, int kVectors>
void add_rows(const PanelPass& p) {
  constexpr int kWidth = kVectors * kLanes;
  Vec sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = p.fresh ? zero() : load(p.sums + r * kWidth + v * kLanes);
    }
  }
  const float* block = p.values;
  const char* next = p.next;
  const int64_t step = p.step, height = p.height;
  for (int64_t i = 0; i < p.count; ++i, block += p.size) {
    for (int line = 0; line < p.lines; ++line, next += 64) prefetch(next);
    const float* x = p.x + p.columns[i] * (p.width * step);
    const int64_t ahead = p.columns[i + 1 < p.count ? i + 1 : i] * (p.width * step) - (x - p.x);
    const float* weight = block;
    for (int k = 0; k < p.width; ++k, x += step, weight += height) {
      Vec samples[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        prefetch(x + ahead + v * kLanes);
        samples[v] = load(x + v * kLanes);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec value = broadcast(weight[r]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(value, samples[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(p.sums + r * kWidth + v * kLanes, sums[r][v]);
  }
}

template <int kRows>
LW_INLINE void add_rows(int vectors, const PanelPass& pass) {
  if (vectors == 3) add_rows<kRows, 3>(pass);
  else add_rows<kRows, 2>(pass);
}

// Sums of one group of samples, [bh][width], to y.
template <class T>
void finish_group(const BlockWeight& w, const BlockGroup& group, int64_t n, const BlockOutput& out,
                  float* sums) {
  const int64_t row = n * w.bh, left = w.N - row;
  const int rows = int(left < w.bh ? left : w.bh), width = group.width;
  const T* bias = static_cast<const T*>(out.bias);
  T* y = static_cast<T*>(out.y);
  for (int r = 0; r < rows && (bias || out.activation || out.batch_last); ++r) {
    const Vec shift = broadcast(bias ? to_float(bias[row + r]) : 0.0f);
    for (int m = 0; m < width; m += kLanes) {
      const Vec sum = activate(load(sums + r * width + m) + shift, out.activation);
      const int count = group.count - m < kLanes ? group.count - m : kLanes;
      if (!out.batch_last) store(sums + r * width + m, sum);
      else if (count > 0) store_first(y + (row + r) * out.M + group.first + m, sum, count);
    }
  }
  if (out.batch_last) return;
  y += group.first * out.N + row;
  if constexpr (sizeof(T) == sizeof(float)) {
    transpose_rows(sums, width, y, out.N, rows, group.count);
  } else {
    float turned[kMostVectors * kLanes * kLanes];
    for (int r = 0; r < rows; r += kLanes) {
      const int some = rows - r < kLanes ? rows - r : kLanes;
      transpose_rows(sums + r * width, width, turned, kLanes, some, group.count);
      for (int m = 0; m < group.count; ++m) {
        store_first(y + m * out.N + r, load_first(turned + m * kLanes, some), some);
      }
    }
  }
}

template <class T>
void panel_row(const BlockWeight& w, const BlockGroup* groups, int count, int64_t n,
               const BlockOutput& out, float* scratch) {
  const T* values = block_values<T>(w);
  const int64_t size = w.size(), at = w.offsets[n], kept = w.offsets[n + 1] - at;
  const int64_t most = size < kPiece ? kPiece / size : 1;
  const int64_t pieces = kept > most ? (kept + most - 1) / most : 1;
  const int64_t passes = int64_t(count) * ((w.bh + kMostRows - 1) / kMostRows);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t begin = at + kept * piece / pieces, end = at + kept * (piece + 1) / pieces;
    const int64_t blocks = end - begin, lines = (blocks * size * int64_t(sizeof(T)) + 63) / 64;
    const float* from;
    if constexpr (sizeof(T) == sizeof(float)) {
      from = values + begin * size;
    } else {
      for (int64_t i = 0; i < blocks * size; i += kLanes) {
        const int64_t left = blocks * size - i;
        if (left >= kLanes) store(scratch + i, load(values + begin * size + i));
        else store_first(scratch + i, load_first(values + begin * size + i, int(left)), int(left));
      }
      from = scratch;
    }
    const int64_t per_block = blocks ? (lines + passes * blocks - 1) / (passes * blocks) : 0;
    const char* next = reinterpret_cast<const char*>(values + end * size);
    float* sums = scratch + block_piece_floats(size);
    int64_t asked = 0;
    for (int g = 0; g < count; ++g) {
      const BlockGroup& group = groups[g];
      if (!group.panel) continue;
      for (int row = 0; row < w.bh; row += kMostRows) {
        const PanelPass pass{from + row, w.columns + begin, blocks, size, w.bh, group.x, group.step, w.bw,
                             sums + row * group.width, piece == 0, next + asked * 64,
                             asked < lines ? int(per_block) : 0};
        asked += per_block * blocks;
        const int vectors = group.width / kLanes;
        if (w.bh - row >= kMostRows) add_rows<kMostRows>(vectors, pass);
        else add_rows<4>(vectors, pass);
      }
      if (piece + 1 == pieces) finish_group<T>(w, group, n, out, sums);
      sums += int64_t(w.bh) * group.width;
    }
  }
}

void block_panel_row(const BlockWeight& w, const BlockGroup* groups, int count, int64_t n,
                     const BlockOutput& out, float* scratch) {
  if (w.bf16) panel_row<Bf16>(w, groups, count, n, out, scratch);
  else panel_row<float>(w, groups, count, n, out, scratch);
}

}  // namespace liveweight::LW_ISA
