// Tensor cores: ldmatrix, mma.m16n8k16 and mma.sp.m16n8k32, for bf16 and fp16 with fp32 sums.
//
// All lanes of a warp call them together. Fragments, with g = lane / 4 and t = lane % 4, pairs
// (low half, high half) of 16-bit elements in each word:
//
//   A [16, 16]  a[0] (g, 2t), (g, 2t+1)        a[1] the same of row g+8
//               a[2] (g, 2t+8), (g, 2t+9)      a[3] the same of row g+8
//   B [16, 8]   b[0] (2t, g), (2t+1, g)        b[1] (2t+8, g), (2t+9, g)
//   D [16, 8]   d[0] (g, 2t)  d[1] (g, 2t+1)   d[2], d[3] the same of row g+8
//
// mma.sp multiplies A [16, 32] of which two in every four neighbours of a row are kept. a holds the
// kept ones, [16, 16], in the fragment above; b[j] holds B [32, 8] at (2t+8j, g), (2t+8j+1, g).
// Metadata, with selector s: lane 4g + 2s + h has the columns 16h to 16h+15 of row g in its lower
// 16 bits, of row g+8 in its upper 16, two bits per kept element, first column lowest: its place
// among its four neighbours. Of each two, the first must be the lower one.
#pragma once

#include <type_traits>

#include "ptx.cuh"

namespace liveweight::cuda {

#if !defined(__CUDACC__)
namespace emulated {

struct Registers4 {
  uint32_t word[4];
};

// Lane i gives the address of row i % 8 of matrix i / 8. Each row is read when its lane arrives: what
// another lane writes there without a barrier in between comes too late in some order.
inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, const char* name) {
  auto& machine = cuda_host::machine;
  if (reinterpret_cast<uintptr_t>(row) % 16) machine.fail(std::string(name) + ": misaligned row");
  const Registers4 data = *static_cast<const Registers4*>(row);
  const auto& warp = machine.gather(
      cuda_host::kFullMask, data, name, {__FILE__, __LINE__}, [&](cuda_host::Warp& w) {
        uint16_t element[4][8][8];
        for (int i = 0; i < 32; ++i) {
          std::memcpy(element[i / 8][i % 8], w.deposit[i].bytes, sizeof data);
        }
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4;
          Registers4 out;
          for (int m = 0; m < 4; ++m) {
            const uint16_t low = transposed ? element[m][2 * t][g] : element[m][g][2 * t];
            const uint16_t high = transposed ? element[m][2 * t + 1][g] : element[m][g][2 * t + 1];
            out.word[m] = uint32_t(high) << 16 | low;
          }
          w.published[lane].put(out);
        }
      });
  const Registers4 mine = warp.published[machine.lane()].get<Registers4>();
  for (int m = 0; m < 4; ++m) r[m] = mine.word[m];
}

template <int kWordsOfB>
struct Operands {
  uint32_t a[4], b[kWordsOfB];
  float d[4];
  uint32_t meta;
};

template <typename T>
inline float half_of(uint32_t word, int which, T) {
  return to_float(T{uint16_t(word >> 16 * which)});
}

// d += a * b, where kept element c of a row stands in column column_of(row, c). Sums in double,
// rounded once: the hardware's order of additions is not documented.
template <int kWordsOfB, typename T, typename Columns>
inline void multiply(cuda_host::Warp& warp, T type, Columns column_of) {
  float a[16][16], b[8 * kWordsOfB][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto in = warp.deposit[lane].get<Operands<kWordsOfB>>();
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < 2; ++e) {
      for (int w = 0; w < 4; ++w) {
        a[g + w % 2 * 8][2 * t + e + w / 2 * 8] = half_of(in.a[w], e, type);
      }
      for (int w = 0; w < kWordsOfB; ++w) b[2 * t + e + 8 * w][g] = half_of(in.b[w], e, type);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto out = warp.deposit[lane].get<Operands<kWordsOfB>>();
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = out.d[i];
      for (int c = 0; c < 16; ++c) sum += double(a[row][c]) * b[column_of(row, c)][column];
      out.d[i] = float(sum);
    }
    warp.published[lane].put(out);
  }
}

template <int kWordsOfB, typename Last>
inline void product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[kWordsOfB],
                    uint32_t meta, const char* name, Last last) {
  Operands<kWordsOfB> in;
  std::memcpy(in.a, a, sizeof a);
  std::memcpy(in.b, b, sizeof b);
  std::memcpy(in.d, d, sizeof d);
  in.meta = meta;
  auto& machine = cuda_host::machine;
  const auto& warp =
      machine.gather(cuda_host::kFullMask, in, name, {__FILE__, __LINE__}, last);
  const auto mine = warp.published[machine.lane()].template get<Operands<kWordsOfB>>();
  std::memcpy(d, mine.d, sizeof d);
}

// Where kept element c of a row stands among the 32 columns.
inline int sparse_column(const cuda_host::Warp& warp, int selector, int row, int c) {
  const int source = row % 8 * 4 + 2 * selector + c / 8;
  const uint32_t meta = warp.deposit[source].get<Operands<4>>().meta >> row / 8 * 16;
  const auto place = [meta](int kept) { return int(meta >> 2 * (kept % 8) & 3u); };
  if (place(c & ~1) >= place(c | 1)) {
    cuda_host::machine.fail("mma_sp_16832: metadata of row " + std::to_string(row) +
                            " is not in increasing order");
  }
  return c / 2 * 4 + place(c);
}

}  // namespace emulated
#endif

// ldmatrix.sync.aligned.m8n8.x4.shared.b16: four 8 x 8 matrices. Lane i gives the address of row
// i % 8 of matrix i / 8 (16 bytes, aligned) and gets (g, 2t), (g, 2t+1) of each.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#if defined(__CUDACC__)
  const uint32_t from = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
#else
  emulated::load_matrices(r, row, false, "ldmatrix_x4");
#endif
}

// The same with .trans: gets (2t, g), (2t+1, g) of each.
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#if defined(__CUDACC__)
  const uint32_t from = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
#else
  emulated::load_matrices(r, row, true, "ldmatrix_x4_trans");
#endif
}

#if defined(__CUDACC__)
#define LW_MMA(type)                                                                      \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                      \
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                   \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
// Metadata in increasing order may say so from PTX 8.5 on; without it sm_90 is slower.
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5)
#define LW_MMA_SP_NAME "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32."
#else
#define LW_MMA_SP_NAME "mma.sp.sync.aligned.m16n8k32.row.col.f32."
#endif
#define LW_MMA_SP(type)                                                                   \
  asm(LW_MMA_SP_NAME type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "            \
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"                                   \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),      \
        "r"(b[3]), "r"(meta), "n"(kSelector))
#endif

// mma.sync.aligned.m16n8k16.row.col.f32: d += a * b.
template <typename T>
__device__ inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 [[maybe_unused]] T type) {
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, Bf16>) {
    LW_MMA("bf16");
  } else {
    static_assert(std::is_same_v<T, Half>);
    LW_MMA("f16");
  }
#else
  emulated::product(d, a, b, 0, "mma_16816", [type](cuda_host::Warp& warp) {
    emulated::multiply<2>(warp, type, [](int, int c) { return c; });
  });
#endif
}

// mma.sp.sync.aligned.m16n8k32.row.col.f32, ordered metadata: d += a * b, a two of four.
template <int kSelector = 0, typename T>
__device__ inline void mma_sp_16832(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                    uint32_t meta, [[maybe_unused]] T type) {
  static_assert(kSelector == 0 || kSelector == 1);
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, Bf16>) {
    LW_MMA_SP("bf16");
  } else {
    static_assert(std::is_same_v<T, Half>);
    LW_MMA_SP("f16");
  }
#else
  emulated::product(d, a, b, meta, "mma_sp_16832", [type](cuda_host::Warp& warp) {
    emulated::multiply<4>(warp, type, [&warp](int row, int c) {
      return emulated::sparse_column(warp, kSelector, row, c);
    });
  });
#endif
}

}  // namespace liveweight::cuda
