// bfloat16 and float16 to float, where the convolution runs on floats: asynchronous copies cannot
// convert, and loads that could would leave too few bytes in flight.
//
// Floor: 6 bytes an element over 4.3 TB/s, 1.4 ns a thousand; a convolution of 64 filters at 90 %
// has 58 products for each.
#pragma once

#include <cstdint>

#include "launch.cuh"
#include "ptx.cuh"

namespace liveweight::cuda::kernelwise {

constexpr int kWidenThreads = 256;
constexpr int kWidened = 8;  // elements of a thread at once: 16 bytes
constexpr int64_t kWidenBlocks = 132 * 8;

struct alignas(16) Floats {
  float value[4];
};

// `head` elements come before the first 16-byte boundary of `from`; to + head lies on one, too.
template <typename T>
__global__ void __launch_bounds__(kWidenThreads)
    widen_elements(const T* from, int64_t count, int head, float* to) {
  const int64_t me = int64_t(blockIdx.x) * kWidenThreads + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * kWidenThreads;
  const int64_t vectors = (count - head) / kWidened, tail = head + vectors * kWidened;
  for (int64_t i = me; i < vectors; i += threads) {
    float value[kWidened];
    widen(load_streaming(from + head + i * kWidened), value, T{});
    Floats* out = reinterpret_cast<Floats*>(to + head + i * kWidened);
    out[0] = {value[0], value[1], value[2], value[3]};
    out[1] = {value[4], value[5], value[6], value[7]};
  }
  if (me < head) to[me] = to_float(from[me]);
  if (me < count - tail) to[tail + me] = to_float(from[tail + me]);
}

// How many floats must be left out before the first one of the result, so that its vectors are
// aligned where those of `from` are.
template <typename T>
int widen_head(const T* from, int64_t count) {
  const int off = int(reinterpret_cast<uintptr_t>(from) % 16 / sizeof(T));
  const int head = off ? kWidened - off : 0;
  return int(count < head ? count : head);
}

// to has `count` floats; to + widen_head(from, count) is on a 16-byte boundary.
template <typename T>
void widen_all(const T* from, int64_t count, float* to, Launch launch) {
  if (count == 0) return;
  const int64_t wanted = (count / kWidened + kWidenThreads) / kWidenThreads;
  const int64_t blocks = wanted < kWidenBlocks ? wanted : kWidenBlocks;
  launch(widen_elements<T>, Shape{grid(blocks), kWidenThreads}, from, count,
         widen_head(from, count), to);
}

}  // namespace liveweight::cuda::kernelwise
