// kernelwise_conv2d with x staged in shared memory and register patches, for K x K kernels.
//
// A block owns a tile of outputs and some filters; a warp owns two of these filters, a heavy and a
// light one, and runs through their kept kernels while the block stages x, a chunk of channels at
// a time, behind the chunk in use.
#pragma once

#include "kernelwise_conv2d_stage.cuh"
#include "kernelwise_conv2d_write.cuh"

namespace liveweight::cuda::kernelwise {

// The kept kernels of one filter, in order of their channels.
struct Kernels {
  int next, end, channel;  // channel of the next kernel; past all channels at the end

  __device__ void find_channel(const int32_t* channels) {
    channel = next < end ? channels[next] : 0x7fffffff;
  }
};

// sums += kernel applied to the patch that begins at `patch`.
template <int K, int S, int R>
__device__ inline void apply_kernel(const float* patch, int pair_pitch,
                                    const float (&weight)[K * K], float (&sums)[R][kQuad]) {
  constexpr int kRows = (R - 1) * S + K, kPairs = ((kQuad - 1) * S + K + 1) / 2;
  const float* pairs[kPairs];
#pragma unroll
  for (int p = 0; p < kPairs; ++p) pairs[p] = patch + p * pair_pitch;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    float x[2 * kPairs];
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const Pair pair = *reinterpret_cast<const Pair*>(pairs[p] + 2 * row);
      x[2 * p] = pair.value[0], x[2 * p + 1] = pair.value[1];
    }
#pragma unroll
    for (int i = 0; i < K; ++i) {
      if ((row - i) % S || row < i || row - i > (R - 1) * S) continue;
#pragma unroll
      for (int j = 0; j < K; ++j) {
#pragma unroll
        for (int q = 0; q < kQuad; ++q) {
          float& sum = sums[(row - i) / S][q];
          sum = fmaf(weight[i * K + j], x[q * S + j], sum);
        }
      }
    }
  }
}

// All kernels of the filter whose channels lie below `end`.
template <int K, int S, int R>
__device__ inline void apply_kernels(const Conv& c, const float* patch, const ConvTile& t, int end,
                                     Kernels& kernels, float (&sums)[R][kQuad]) {
  while (kernels.channel < end) {
    float weight[K * K];
    const float* values = c.values + int64_t(kernels.next) * (K * K);
#pragma unroll
    for (int i = 0; i < K * K; ++i) weight[i] = values[i];
    const float* from = patch + kernels.channel * t.channel_pitch;
    ++kernels.next;
    kernels.find_channel(c.channels);
    apply_kernel<K, S, R>(from, t.pair_pitch, weight, sums);
  }
}

template <int K, int S, int R>
__global__ void __launch_bounds__(256, 2) conv_tile(Conv c, ConvTile t) {
  LW_DYNAMIC_SHARED(shared);
  const int places_end = t.places() * int(sizeof(Place));
  Place* places = reinterpret_cast<Place*>(shared);
  int* dealt = reinterpret_cast<int*>(shared + places_end);
  float* stages = reinterpret_cast<float*>(shared + shared_before_stages(t));
  const Block b = find_block(c, t, S);
  const int stage_words = t.chunk * t.channel_pitch;
  // Padding stays zero: later only pixels are written.
  for (int n = int(threadIdx.x) * 4; n < 2 * stage_words; n += int(blockDim.x) * 4) {
    *reinterpret_cast<Quad*>(stages + n) = Quad{};
  }
  list_pixels(c, t, b, places);
  deal_filters(c, b, dealt);
  __syncthreads();

  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  int mine[kFiltersPerWarp];
  Kernels kernels[kFiltersPerWarp];
  float sums[kFiltersPerWarp][R][kQuad] = {};
#pragma unroll
  for (int f = 0; f < kFiltersPerWarp; ++f) {
    const int rank = f == 0 ? warp : t.filters() - 1 - warp;
    mine[f] = rank < b.filters ? dealt[rank] : -1;
    kernels[f].next = mine[f] < 0 ? 0 : c.filter_offsets[b.first_filter + mine[f]];
    kernels[f].end = mine[f] < 0 ? 0 : c.filter_offsets[b.first_filter + mine[f] + 1];
    kernels[f].find_channel(c.channels);
  }
  // Lanes beyond the last sample compute what nobody reads, from the first.
  const int image = lane / (t.across * t.down) < t.images ? lane / (t.across * t.down) : 0;
  const int lane_at = image * t.image_pitch + lane / t.across % t.down * R * S * 2 +
                      lane % t.across * (kQuad * S / 2) * t.pair_pitch;

  // Once around: the next chunk is staged while the one before is used; at first there is none.
  int current = 1;
  for (int first = -t.chunk; first < c.group_channels; first += t.chunk, current ^= 1) {
    const int next = first + t.chunk;
    if (next < c.group_channels) {
      stage(c, t, b, places, next, least(t.chunk, c.group_channels - next),
            stages + (current ^ 1) * stage_words);
    }
    cp_async_commit();
    const float* patch = stages + current * stage_words + lane_at - first * t.channel_pitch;
#pragma unroll
    for (int f = 0; f < kFiltersPerWarp; ++f) {
      apply_kernels<K, S, R>(c, patch, t, next, kernels[f], sums[f]);
    }
    cp_async_wait<0>();
    __syncthreads();
  }

  if (t.direct_store) {
#pragma unroll
    for (int f = 0; f < kFiltersPerWarp; ++f) {
      if (mine[f] >= 0) write_patch(c, t, b, b.first_filter + mine[f], sums[f]);
    }
    return;
  }
#pragma unroll
  for (int f = 0; f < kFiltersPerWarp; ++f) {
    if (mine[f] < 0) continue;
    float* to = stages + mine[f] * (R * 32 * kQuad) + lane * kQuad;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      Quad quad;
#pragma unroll
      for (int q = 0; q < kQuad; ++q) quad.value[q] = sums[f][r][q];
      *reinterpret_cast<Quad*>(to + r * 32 * kQuad) = quad;
    }
  }
  write_tile(c, t, b, places, stages);
}

}  // namespace liveweight::cuda::kernelwise
