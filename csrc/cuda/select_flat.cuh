// The k largest of all scores together, without a sort: radix selection by many blocks.
//
// Each pass counts, among the keys that share the digits found so far, how many have each value of
// the next 11 bits; the digit in which the count from the top reaches k is the pivot's. Counts are
// integers, so the order of the atomics does not matter. Where only some copies of the pivot are
// kept, each warp's copies are counted and the lowest indices win.
//
// Reads: 3 for float32 (6 for float64) and one for the mask; one more where copies of the pivot are
// dropped. 58.7 million float32: 0.94 GB, 0.22 ms at the 4.3 TB/s of an H200.
//
// With sizes, an element counts sizes[i] instead of 1, and one with a size <= 0 is never kept.
#pragma once

#include <cstdint>

#include "launch.cuh"
#include "select_block.cuh"

namespace liveweight::cuda {

constexpr int kFlatThreads = 256;
constexpr int kFlatWarps = kFlatThreads / kWarpLanes;
constexpr int kFlatBlocks = 528;  // four per multiprocessor of an H200; the same on every GPU
constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kCopies = 4;        // of a block's counts, as neighbours often share a digit
constexpr int kAtOnce = 8;        // loads in flight per thread
constexpr int kWordsAtOnce = 4;   // the same where a warp walks along the words of the mask
constexpr int kFlatMaskWarps = kFlatBlocks * kFlatWarps;

// What is known of the pivot (all ones where k = 0). `left` counts down from k.
template <class Key>
struct FlatState {
  Key pivot;
  long long left;
  long long ties;  // the sum over the elements with the pivot's key
  unsigned long long bad;
};

template <class T>
struct FlatScores {
  const T* data;
  const int64_t* sizes;  // or null: each 1
  int64_t rows, columns;

  __host__ __device__ int64_t count() const { return rows * columns; }
  __host__ __device__ int64_t words_per_row() const { return (columns + 31) / 32; }
  __device__ int64_t size(int64_t i) const { return sizes ? max(sizes[i], int64_t(0)) : 1; }
};

// Starts a selection: k to keep, no digit known, all counts 0.
template <class Key>
__global__ void __launch_bounds__(kFlatThreads)
    start_flat(FlatState<Key>* state, unsigned long long* counts, int64_t k) {
  for (int d = threadIdx.x; d < kDigits; d += kFlatThreads) counts[d] = 0;
  if (threadIdx.x == 0) *state = {Key(k > 0 ? 0 : ~Key(0)), (long long)k, 0, kNoIndex};
}

// Adds one pass over the scores to counts[kDigits]: of the keys that equal the pivot above bit
// `shift + bits`, by the `bits` bits from `shift` on. Dynamic shared memory: counts of a block.
template <class T, class Key, class Count, int kOf>
__global__ void __launch_bounds__(kFlatThreads)
    count_digits(FlatScores<T> scores, FlatState<Key>* state, unsigned long long* counts,
                 int shift, int bits, bool first) {
  LW_DYNAMIC_SHARED(memory);
  Count* mine = reinterpret_cast<Count*>(memory);  // [kDigits][kOf]
  for (int d = threadIdx.x; d < kDigits * kOf; d += kFlatThreads) mine[d] = 0;
  const Key known = first ? 0 : state->pivot >> (shift + bits);
  __syncthreads();
  const int64_t total = scores.count(), step = int64_t(gridDim.x) * kFlatThreads;
  const int copy = int(threadIdx.x) % kOf;
  const auto take = [&](int64_t i, T score) {
    const Key key = count_key(score);
    if (first && key == Key(~Key(0))) atomicMin(&state->bad, (unsigned long long)i);
    if (!first && key >> (shift + bits) != known) return;
    const int digit = int(key >> shift) & ((1 << bits) - 1);
    atomicAdd(&mine[digit * kOf + copy], Count(scores.size(i)));
  };
  int64_t i = int64_t(blockIdx.x) * kFlatThreads + threadIdx.x;
  for (; i + (kAtOnce - 1) * step < total; i += kAtOnce * step) {
    T score[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) score[u] = scores.data[i + u * step];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) take(i + u * step, score[u]);
  }
  for (; i < total; i += step) take(i, scores.data[i]);
  __syncthreads();
  for (int d = threadIdx.x; d < kDigits; d += kFlatThreads) {
    unsigned long long sum = 0;
#pragma unroll
    for (int c = 0; c < kOf; ++c) sum += mine[d * kOf + c];
    if (sum) atomicAdd(&counts[d], sum);
  }
}

// Finds the next digit of the pivot and clears the counts. One block.
template <class Key>
__global__ void __launch_bounds__(kFlatThreads)
    pick_digit(FlatState<Key>* state, unsigned long long* counts, int shift) {
  __shared__ long long by_warp[kFlatWarps];
  constexpr int kRun = kDigits / kFlatThreads;
  const int top = kDigits - 1 - int(threadIdx.x) * kRun;  // a thread's digits: top, top - 1, ...
  const long long left = state->left;
  long long sum = 0;
  for (int r = 0; r < kRun; ++r) sum += (long long)counts[top - r];
  const long long inclusive = warp_inclusive_sum(sum);
  if (lane_index() == kWarpLanes - 1) by_warp[warp_index()] = inclusive;
  __syncthreads();
  long long before = inclusive - sum, total = 0;
  for (int w = 0; w < kFlatWarps; ++w) {
    if (w < warp_index()) before += by_warp[w];
    total += by_warp[w];
  }
  // Where less than k is there, everything is kept: the pivot stays below all keys but those of
  // nothing. The digit 0 of every pass leads there, with nothing left over.
  for (int r = 0; r < kRun; ++r) {
    const long long count = (long long)counts[top - r];
    counts[top - r] = 0;
    const bool here = before < left && before + count >= left;
    const bool last = top - r == 0 && total < left;
    if (here || last) {
      state->pivot |= Key(top - r) << shift;
      state->left = left - before;
      state->ties = count;
    }
    before += count;
  }
}

// The words of the mask that a warp writes.
struct WordRange {
  int64_t begin, end;

  __device__ WordRange(int64_t words) {
    const int64_t run = (words + kFlatMaskWarps - 1) / kFlatMaskWarps;
    const int64_t warp = int64_t(blockIdx.x) * kFlatWarps + warp_index();
    begin = min(warp * run, words);
    end = min(begin + run, words);
  }
};

// Calls visit(word, index, key) for the elements of a warp's words, 32 neighbours at a time; lanes
// past the end of a row get index -1 and key 0.
template <class Key, class T, class Visit>
__device__ inline void each_word(const FlatScores<T>& scores, Visit visit) {
  const int64_t per_row = scores.words_per_row();
  const WordRange words(scores.rows * per_row);
  if (words.begin >= words.end) return;
  int64_t row = words.begin / per_row, word = words.begin - row * per_row;
  for (int64_t w = words.begin; w < words.end; w += kWordsAtOnce) {
    int64_t index[kWordsAtOnce];
    Key key[kWordsAtOnce];
#pragma unroll
    for (int u = 0; u < kWordsAtOnce; ++u) {
      const int64_t column = word * 32 + lane_index();
      const bool there = w + u < words.end && column < scores.columns;
      index[u] = there ? row * scores.columns + column : -1;
      key[u] = there ? count_key(scores.data[index[u]]) : 0;
      if (++word == per_row) {
        word = 0;
        ++row;
      }
    }
#pragma unroll
    for (int u = 0; u < kWordsAtOnce; ++u) {
      if (w + u < words.end) visit(w + u, index[u], key[u]);
    }
  }
}

// ties[warp]: the sum over the elements with the pivot's key among a warp's words.
template <class T, class Key>
__global__ void __launch_bounds__(kFlatThreads)
    count_ties(FlatScores<T> scores, const FlatState<Key>* state, long long* ties) {
  if (state->ties <= state->left) return;  // all are kept
  const Key pivot = state->pivot;
  long long sum = 0;
  each_word<Key>(scores, [&](int64_t, int64_t i, Key key) {
    if (i >= 0 && key == pivot) sum += scores.size(i);
  });
  sum = warp_inclusive_sum(sum);
  if (lane_index() == kWarpLanes - 1) {
    ties[int64_t(blockIdx.x) * kFlatWarps + warp_index()] = sum;
  }
}

// Turns ties into the sums over all warps before each. One block.
template <class Key>
__global__ void __launch_bounds__(kFlatThreads)
    scan_ties(const FlatState<Key>* state, long long* ties) {
  if (state->ties <= state->left) return;
  __shared__ long long by_warp[kFlatWarps];
  constexpr int kRun = (kFlatMaskWarps + kFlatThreads - 1) / kFlatThreads;
  const int begin = int(threadIdx.x) * kRun;
  const int end = min(begin + kRun, kFlatMaskWarps);
  long long sum = 0;
  for (int i = begin; i < end; ++i) sum += ties[i];
  const long long inclusive = warp_inclusive_sum(sum);
  if (lane_index() == kWarpLanes - 1) by_warp[warp_index()] = inclusive;
  __syncthreads();
  long long before = inclusive - sum;
  for (int w = 0; w < warp_index(); ++w) before += by_warp[w];
  for (int i = begin; i < end; ++i) {
    const long long own = ties[i];
    ties[i] = before;
    before += own;
  }
}

struct FlatMask {
  uint8_t* bytes;   // [rows, columns]
  uint32_t* words;  // or bits [rows, ceil(columns / 32)]
};

// Writes the mask. In the order of the index, elements with the pivot's key are kept as long as
// their sizes add up to at most state->left.
template <class T, class Key>
__global__ void __launch_bounds__(kFlatThreads)
    write_flat(FlatScores<T> scores, const FlatState<Key>* state, const long long* ties,
               FlatMask mask) {
  const Key pivot = state->pivot;
  const long long left = state->left;
  const bool all = state->ties <= left;
  long long before = all ? 0 : ties[int64_t(blockIdx.x) * kFlatWarps + warp_index()];
  each_word<Key>(scores, [&](int64_t word, int64_t i, Key key) {
    const long long size = i >= 0 ? scores.size(i) : 0;
    bool keep = size > 0 && (key > pivot || (all && key == pivot));
    const long long equal = key == pivot && i >= 0 ? size : 0;
    if (!all && __ballot_sync(kAllLanes, equal > 0)) {
      const long long until = before + warp_inclusive_sum(equal);
      keep |= equal > 0 && until <= left;
      before = __shfl_sync(kAllLanes, until, kWarpLanes - 1);
    }
    if (!mask.words) {
      if (i >= 0) mask.bytes[i] = keep;
      return;
    }
    const uint32_t bits = __ballot_sync(kAllLanes, keep);
    if (lane_index() == 0) mask.words[word] = bits;
  });
}

// What the launches of one selection share; all from torch's allocator.
template <class Key>
struct FlatWork {
  FlatState<Key>* state;
  unsigned long long* counts;  // [kDigits]
  long long* ties;             // [kFlatMaskWarps]
};

// Keeps the largest scores whose sizes sum to at most k; state->bad: the first index of a NaN.
template <class Key, class T, class Launch>
void select_flat(const FlatScores<T>& scores, int64_t k, const FlatWork<Key>& work,
                 const FlatMask& mask, const Launch& launch) {
  constexpr int kKeyBits = 8 * int(sizeof(Key));
  launch(start_flat<Key>, Shape{grid(1), kFlatThreads}, work.state, work.counts, k);
  const int64_t blocks = min((scores.count() + kFlatThreads - 1) / kFlatThreads,
                             int64_t(kFlatBlocks));
  for (int top = kKeyBits; top > 0;) {
    const int bits = min(top, kDigitBits), shift = top - bits;
    const auto count = [&](auto kernel, int bytes) {
      launch(kernel, Shape{grid(blocks), kFlatThreads, kDigits * bytes}, scores, work.state,
             work.counts, shift, bits, top == kKeyBits);
    };
    if (scores.sizes) {
      count(count_digits<T, Key, unsigned long long, 1>, 8);
    } else {
      count(count_digits<T, Key, unsigned, kCopies>, 4 * kCopies);
    }
    launch(pick_digit<Key>, Shape{grid(1), kFlatThreads}, work.state, work.counts, shift);
    top = shift;
  }
  launch(count_ties<T, Key>, Shape{grid(kFlatBlocks), kFlatThreads}, scores, work.state, work.ties);
  launch(scan_ties<Key>, Shape{grid(1), kFlatThreads}, work.state, work.ties);
  launch(write_flat<T, Key>, Shape{grid(kFlatBlocks), kFlatThreads}, scores, work.state, work.ties,
         mask);
}

}  // namespace liveweight::cuda
