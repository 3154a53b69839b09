// kernelwise_conv2d with x staged in shared memory and register patches, for K x K kernels.
//
// A block owns a tile of outputs and some filters; a warp owns two of these filters, a heavy and a
// light one, and runs through their kept kernels while the block stages x, a chunk of channels at
// a time, behind the chunk in use.
#pragma once

#include "kernelwise_conv2d_stage.cuh"
#include "kernelwise_conv2d_write.cuh"

namespace liveweight::cuda::kernelwise {

// The kept kernels of one filter, in order of their channels, and the weights of the next one.
template <int K>
struct Kernels {
  int next, end, channel;  // channel of the next kernel; past all channels at the end
  float weight[K * K];

  __device__ void begin(const Conv& c, int first, int last) {
    next = first, end = last;
    find_channel(c);
    if (next == end) return;
    const float* from = values(c);
#pragma unroll
    for (int i = 0; i < K * K; ++i) weight[i] = from[i];
  }
  // Weights of the next kernel; after the last one its own once more, for nothing.
  __device__ const float* values(const Conv& c) const {
    return c.values + int64_t(next < end ? next : end - 1) * (K * K);
  }
  __device__ void find_channel(const Conv& c) {
    channel = next < end ? c.channels[next] : 0x7fffffff;
  }
};

// sums += kernel applied to the patch that begins at `patch`. A row of weights is replaced by the
// following kernel's as soon as its last product is done.
template <int K, int S, int R>
__device__ inline void apply_kernel(const float* patch, int pair_pitch, const float* following,
                                    float (&weight)[K * K], float (&sums)[R][kQuad]) {
  constexpr int kRows = (R - 1) * S + K, kPairs = ((kQuad - 1) * S + K + 1) / 2;
  constexpr int kStep = R * S, kGap = (kStep + 1) % 2;
  const float* pairs[kPairs];
#pragma unroll
  for (int p = 0; p < kPairs; ++p) pairs[p] = patch + p * pair_pitch;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    float x[2 * kPairs];
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const Pair pair = *reinterpret_cast<const Pair*>(pairs[p] + 2 * (row + row / kStep * kGap));
      x[2 * p] = pair.value[0], x[2 * p + 1] = pair.value[1];
    }
#pragma unroll
    for (int i = 0; i < K; ++i) {
      if ((row - i) % S || row < i || row - i > (R - 1) * S) continue;
#pragma unroll
      for (int j = 0; j < K; ++j) {
        float& w = weight[i * K + j];
#pragma unroll
        for (int q = 0; q < kQuad; ++q) {
          float& sum = sums[(row - i) / S][q];
          sum = fmaf(w, x[q * S + j], sum);
        }
        if (row - i == (R - 1) * S) w = following[i * K + j];
      }
    }
  }
}

// All kernels of the filter whose channels lie below `end`.
template <int K, int S, int R>
__device__ inline void apply_kernels(const Conv& c, const float* patch, const ConvTile& t, int end,
                                     Kernels<K>& kernels, float (&sums)[R][kQuad]) {
  while (kernels.channel < end) {
    const float* from = patch + kernels.channel * t.channel_pitch;
    ++kernels.next;
    kernels.find_channel(c);
    apply_kernel<K, S, R>(from, t.pair_pitch, kernels.values(c), kernels.weight, sums);
  }
}

// The warp's f-th filter, counted from the block's first; -1 where there is none.
__device__ inline int filter_of_warp(const ConvTile& t, const Block& b, const int* dealt, int f) {
  const int warp = int(threadIdx.x) / 32, rank = f == 0 ? warp : t.filters() - 1 - warp;
  return rank < b.filters ? dealt[rank] : -1;
}

// All that comes before the first chunk: padding stays zero, later only pixels are written.
__device__ inline void prepare(const Conv& c, const ConvTile& t, int stride, Block& b,
                               Place* places, int* dealt, float* stages) {
  if (threadIdx.x == 0) b = find_block(c, t, stride);
  const int words = 2 * t.chunk * t.channel_pitch;
#pragma unroll 1
  for (int n = int(threadIdx.x) * kQuad; n < words; n += int(blockDim.x) * kQuad) {
    *reinterpret_cast<Quad*>(stages + n) = Quad{};
  }
  __syncthreads();
  list_pixels(c, t, b, places);
  deal_filters(c, b, dealt);
  __syncthreads();
}

template <int K, int S, int R>
__global__ void __launch_bounds__(256, 2) conv_tile(Conv c, ConvTile t) {
  LW_DYNAMIC_SHARED(shared);
  Block& b = *reinterpret_cast<Block*>(shared);
  Place* places = reinterpret_cast<Place*>(shared + kBlockBytes);
  int* dealt = reinterpret_cast<int*>(places + t.places());
  float* stages = reinterpret_cast<float*>(shared + shared_before_stages(t));
  prepare(c, t, S, b, places, dealt, stages);

  Kernels<K> kernels[kFiltersPerWarp];
  float sums[kFiltersPerWarp][R][kQuad] = {};
#pragma unroll
  for (int f = 0; f < kFiltersPerWarp; ++f) {
    const int mine = filter_of_warp(t, b, dealt, f);
    const int32_t* offsets = c.filter_offsets + b.first_filter + mine;
    kernels[f].begin(c, mine < 0 ? 0 : offsets[0], mine < 0 ? 0 : offsets[1]);
  }
  // Lanes beyond the last sample compute what nobody reads, as the first lane does.
  const int lane = int(threadIdx.x) % 32;
  const int lane_at = t.first_word(lane / (t.across * t.down) < t.images ? lane : 0, S);

  // Once around: the next chunk is staged while the one before is used; at first there is none.
  const int stage_words = t.chunk * t.channel_pitch;
  int current = stage_words;  // where the chunk in use begins: 0 or stage_words
#pragma unroll 1
  for (int first = -t.chunk; first < c.group_channels; first += t.chunk) {
    const int next = first + t.chunk;
    if (next < c.group_channels) {
      stage(c, t, b, places, next, least(t.chunk, c.group_channels - next),
            stages + stage_words - current);
    }
    cp_async_commit();
    const float* patch = stages + current + lane_at - first * t.channel_pitch;
#pragma unroll
    for (int f = 0; f < kFiltersPerWarp; ++f) {
      apply_kernels<K, S, R>(c, patch, t, next, kernels[f], sums[f]);
    }
    cp_async_wait<0>();
    __syncthreads();
    current = stage_words - current;
  }

#pragma unroll
  for (int f = 0; f < kFiltersPerWarp; ++f) {
    const int mine = filter_of_warp(t, b, dealt, f);
    if (mine < 0) continue;
    if (t.direct_store) write_patch(c, t, b, b.first_filter + mine, sums[f]);
    else keep_sums(stages + mine * (R * 32 * kQuad), sums[f]);
  }
  if (!t.direct_store) write_tile(c, t, b, places, stages);
}

}  // namespace liveweight::cuda::kernelwise
