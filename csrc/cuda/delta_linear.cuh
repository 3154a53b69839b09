// y = act(x W^T + bias) for 1 to 8 tokens at once, W in the Delta format (see delta.cuh).
//
// The weight is read once: a kept weight takes 2.7 bytes at 90 % sparsity (16 bits, 5 for its delta,
// fillers), so an H200 (4.3 TB/s, 132 multiprocessors at 1.75 GHz) brings 6.9 of them each clock to
// a multiprocessor. Floors, counted for random columns; none is measured:
//
//   tokens  instructions  wavefronts of shared memory   entries a clock: instructions, shared memory
//   1       8.1           3.4 for 32 gathers            15.8  8.0
//   2       9.8           3.5                           13.1  7.8
//   4       14.3          6.1, with classes 4.0         9.0   4.7, with classes 6.9
//   8       22.6          10.4, with classes 4.0        5.7   2.9, with classes 6.9
//
// (128 instructions of threads a clock; loads of the weight take 21 wavefronts for 1024 entries, on
// the way of the gathers.) Streams that keep to a class of columns meet no bank twice when 8 lanes
// gather 16 bytes each, but hold 10 to 15 % more fillers. So one token is bound by memory, 8 tokens
// take twice as long without classes and a quarter more with them. Fillers are 4 % at 90 %; that
// they are left out, so that NaN and infinity do not pass them, is one of the instructions.
// A lane adds up its own stream, one column after the other, so nothing is scanned or shuffled
// before the row's end. At most 16 warps share one copy of x; each has 2 to 3 KB under way, and the
// first 2.6 KB since before x is staged.
#pragma once

#include <bit>
#include <cstdint>

#include "activation.cuh"
#include "delta.cuh"
#include "launch.cuh"

namespace liveweight::cuda {

constexpr int kDeltaWarps = 16;  // per block, at most: 128 registers for each thread

template <typename T>
struct DeltaCall {
  DeltaWeight weight;
  const T* x;      // [tokens, columns]
  const T* bias;   // [rows] or null
  T* y;            // [tokens, rows]
  float* partial;  // [parts, tokens, rows] where parts > 1
  int64_t tokens;
  int activation;
  bool aligned;  // every vector of 8 / kTokens elements of a row of x may be loaded at once
};

// 2 * kCount bytes of x, in words.
template <int kCount>
struct alignas(2 * kCount) Halves {
  uint16_t half[kCount];
};

template <int kCount, typename T>
__device__ inline Halves<kCount> load_halves(const T* x, int64_t count, bool aligned) {
  if (aligned && count >= kCount) return *reinterpret_cast<const Halves<kCount>*>(x);
  Halves<kCount> out;
#pragma unroll
  for (int c = 0; c < kCount; ++c) out.half[c] = c < count ? x[c].bits : 0;
  return out;
}

// Lays the columns of a part out as [column][kTokens], so that one load gathers all tokens of a
// column; tokens that do not exist are zeros. A thread writes 16 bytes at once: no conflicts.
template <typename T, int kTokens>
__device__ inline void stage(const DeltaCall<T>& call, int64_t token, int64_t column, int width,
                             unsigned char* staged) {
  constexpr int kColumns = kGroup / kTokens;
#pragma unroll 2
  for (int at = int(threadIdx.x) * kColumns; at < width; at += int(blockDim.x) * kColumns) {
    Halves<kColumns> in[kTokens] = {};
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (token + t < call.tokens) {
        const T* row = call.x + (token + t) * call.weight.columns + column;
        in[t] = load_halves<kColumns>(row + at, width - at, call.aligned);
      }
    }
    Vector16 out;
#pragma unroll
    for (int i = 0; i < kGroup; i += 2) {
      const uint32_t low = in[i % kTokens].half[i / kTokens];
      const uint32_t high = in[(i + 1) % kTokens].half[(i + 1) / kTokens];
      out.word[i / 2] = low | high << 16;
    }
    *reinterpret_cast<Vector16*>(staged + 2 * kTokens * at) = out;
  }
}

// The staged elements of one column, widened.
template <typename T, int kTokens>
__device__ inline void gather(SharedAddress at, float (&out)[kTokens]) {
  if constexpr (kTokens == 1) {
    uint32_t word[1];
    load_shared(at, word, uint16_t());
    out[0] = low_half(word[0], T{});
  } else {
    uint32_t word[kTokens / 2];
    load_shared(at, word);
#pragma unroll
    for (int t = 0; t < kTokens; t += 2) {
      out[t] = low_half(word[t / 2], T{});
      out[t + 1] = high_half(word[t / 2], T{});
    }
  }
}

// Adds the products of group g. `at` is where the last entry's column stands in shared memory.
// Fillers are left out: 0 * infinity would reach a row that has no weight there.
template <typename T, int kTokens, int kClasses, int kBits>
__device__ inline void add_group(const Chunk<kBits>& chunk, int g, SharedAddress& at,
                                 float (&sum)[kTokens]) {
  // The bytes of a delta of 1, as a power of two.
  constexpr int kScale = std::bit_width(unsigned(2 * kTokens * kClasses)) - 1;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    at += chunk.template delta<kScale>(g * kGroup + j);
    float x[kTokens];
    gather<T>(at, x);
    const uint32_t word = chunk.values[g].word[j / 2];
    const float value = j % 2 ? high_half(word, T{}) : low_half(word, T{});
    fma_unless_minus_zero(value, x, sum);
  }
}

// Adds the products of the chunk and loads the next one in its place.
template <typename T, int kTokens, int kClasses, int kBits>
__device__ inline void add_chunk(Chunk<kBits>& chunk, Walk& walk, SharedAddress& at,
                                 float (&sum)[kTokens]) {
  if (walk.now >= kChunkGroups) {
#pragma unroll
    for (int g = 0; g < kChunkGroups; ++g) {
      add_group<T, kTokens, kClasses>(chunk, g, at, sum);
      chunk.load(walk, g);
    }
  } else {
#pragma unroll
    for (int g = 0; g < kChunkGroups - 1; ++g) {
      if (g < walk.now) add_group<T, kTokens, kClasses>(chunk, g, at, sum);
    }
  }
  chunk.step(walk);
}

// Adds up the streams of each row, always in the same order, and writes the row's outputs.
template <typename T, int kTokens>
__device__ inline void finish_row(const DeltaCall<T>& call, int row, float bias, int64_t token,
                                  int lane, float (&sum)[kTokens]) {
  const DeltaWeight& w = call.weight;
  for (int distance = w.lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) sum[t] += shfl_xor(sum[t], distance);
  }
  if (row < 0) return;
  for (int t = lane % w.lanes; t < kTokens && token + t < call.tokens; t += w.lanes) {
    float total = 0;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) total = i == t ? sum[i] : total;
    const int64_t place = (token + t) * w.rows + row;
    if (w.parts > 1) {
      call.partial[blockIdx.z * call.tokens * w.rows + place] = total;
    } else {
      call.y[place] = from_float<T>(activate(total + bias, call.activation));
    }
  }
}

// The slices of a warp, one after the other; the first chunk was loaded before x was staged.
template <typename T, int kTokens, int kClasses, int kBits>
__device__ inline void run_slices(const DeltaCall<T>& call, int slice, int step, int end,
                                  int64_t token, Walk& walk, Chunk<kBits>& chunk,
                                  SharedAddress staged) {
  const int lane = int(threadIdx.x) % kLaneCount;
  while (slice < end) {
    if (call.weight.head) walk.find_tail(call.weight, lane);
    SharedAddress at = staged + uint32_t(walk.start) * 2 * kTokens;
    const int row = walk.row;
    const float bias = call.bias && row >= 0 ? to_float(call.bias[row]) : 0.f;
    float sum[kTokens] = {};
    while (walk.now > 0) add_chunk<T, kTokens, kClasses>(chunk, walk, at, sum);
    slice += step;
    walk.open(call.weight, slice, end, lane, chunk);
    finish_row(call, row, bias, token, lane, sum);
  }
}

// Grid (blocks, ceil(tokens / kTokens), parts); slices go round the blocks, then round the warps of
// a block: the longest come first, so every multiprocessor gets its share of them.
template <typename T, int kBits, int kTokens, int kClasses>
__global__ void __launch_bounds__(kDeltaWarps* kLaneCount, 1)
    delta_linear_rows(DeltaCall<T> call) {
  LW_DYNAMIC_SHARED(staged);
  const DeltaWeight& w = call.weight;
  const int lane = int(threadIdx.x) % kLaneCount;
  const int step = int(gridDim.x) * (int(blockDim.x) / kLaneCount);
  const int first = int(blockIdx.z) * w.slices, end = first + w.slices;
  const int slice =
      first + int(blockIdx.x) + int(gridDim.x) * (int(threadIdx.x) / kLaneCount);
  const int64_t token = int64_t(blockIdx.y) * kTokens;

  Walk walk;
  Chunk<kBits> chunk;
  walk.open(w, slice, end, lane, chunk);

  const int64_t column = int64_t(blockIdx.z) * w.part;
  const int64_t rest = w.columns - column;
  stage<T, kTokens>(call, token, column, int(rest < w.part ? rest : w.part), staged);
  __syncthreads();
  run_slices<T, kTokens, kClasses>(call, slice, step, end, token, walk, chunk,
                                   shared_address(staged));
}

// y from the partial sums of all parts, in their order. Grid (ceil(tokens * rows / 256)).
template <typename T>
__global__ void __launch_bounds__(256) finish_delta_linear(DeltaCall<T> call) {
  const int64_t outputs = call.tokens * call.weight.rows;
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= outputs) return;
  float sum = call.partial[i];
  for (int part = 1; part < call.weight.parts; ++part) sum += call.partial[part * outputs + i];
  const float bias = call.bias ? to_float(call.bias[i % call.weight.rows]) : 0.f;
  call.y[i] = from_float<T>(activate(sum + bias, call.activation));
}

// Columns of x that a block stages: the longest part's.
inline int64_t staged_columns(const DeltaWeight& w) {
  return w.columns < w.part ? w.columns : w.part;
}

inline int staged_bytes(const DeltaWeight& w, int tokens) {
  return int(div_up(staged_columns(w) * tokens, kGroup) * kGroup * 2);
}

// Tokens that one pass over the weight takes: all of them up to 8, if x then fits into `shared`
// bytes. One token always does: a part has at most 32768 columns. Where columns have classes there
// is no pass of two.
inline int tokens_per_pass(const DeltaWeight& w, int64_t tokens, int shared) {
  int most = 8;
  while (most > 1 && (most / 2 >= tokens || staged_bytes(w, most) > shared)) most /= 2;
  if (most == 2 && w.classes > 1) most = staged_bytes(w, 4) <= shared ? 4 : 1;
  return most;
}

template <typename T, int kBits, int kTokens, int kClasses>
void launch_delta_linear(const DeltaCall<T>& call, const Launch& launch) {
  const DeltaWeight& w = call.weight;
  const int64_t blocks = w.slices < kMultiprocessors ? w.slices : kMultiprocessors;
  const int64_t warps = div_up(w.slices, blocks);
  const int threads = int(warps < kDeltaWarps ? warps : kDeltaWarps) * kLaneCount;
  launch(delta_linear_rows<T, kBits, kTokens, kClasses>,
         Shape{grid(blocks, div_up(call.tokens, kTokens), w.parts), threads,
               staged_bytes(w, kTokens)},
         call);
}

template <typename T, int kBits>
void launch_delta_linear(const DeltaCall<T>& call, int tokens, const Launch& launch) {
  if (call.weight.classes > 1) {
    if (tokens == 1) return launch_delta_linear<T, kBits, 1, 8>(call, launch);
    if (tokens == 4) return launch_delta_linear<T, kBits, 4, 8>(call, launch);
    return launch_delta_linear<T, kBits, 8, 8>(call, launch);
  }
  if (tokens == 1) return launch_delta_linear<T, kBits, 1, 1>(call, launch);
  if (tokens == 2) return launch_delta_linear<T, kBits, 2, 1>(call, launch);
  if (tokens == 4) return launch_delta_linear<T, kBits, 4, 1>(call, launch);
  return launch_delta_linear<T, kBits, 8, 1>(call, launch);
}

// All tokens, in passes of at most 8; at least one token and one row.
template <typename T>
void delta_linear(DeltaCall<T> call, int bits, int shared, const Launch& launch) {
  const DeltaWeight& w = call.weight;
  const int tokens = tokens_per_pass(w, call.tokens, shared);
  const int step = 2 * kGroup / tokens;  // bytes of x that a thread loads at once
  call.aligned = reinterpret_cast<uintptr_t>(call.x) % step == 0 && w.columns * 2 % step == 0;
  with_bits(bits, [&](auto b) {
    launch_delta_linear<T, decltype(b)::value>(call, tokens, launch);
  });
  if (w.parts > 1) {
    launch(finish_delta_linear<T>, Shape{grid(div_up(call.tokens * w.rows, 256)), 256}, call);
  }
}

}  // namespace liveweight::cuda
