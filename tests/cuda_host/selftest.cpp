// The emulator's own behaviour: prints one line per check, "name: what happened".
#include <cstdio>

#include "launch.cuh"
#include "ptx.cuh"

namespace {

using cuda_host::machine;
using cuda_host::Order;

void exchange_kernel(int* wrong) {
  const int lane = threadIdx.x % 32;
  if (__shfl_xor_sync(0xffffffffu, lane, 5) != (lane ^ 5)) atomicAdd(wrong, 1);
  if (__shfl_sync(0xffffffffu, 2.5 * lane, 7) != 17.5) atomicAdd(wrong, 1);
  if (__shfl_down_sync(0xffffffffu, lane, 3) != (lane + 3 < 32 ? lane + 3 : lane)) {
    atomicAdd(wrong, 1);
  }
  if (__ballot_sync(0xffffffffu, lane % 2) != 0xaaaaaaaau) atomicAdd(wrong, 1);
  __syncwarp();
  atomicMax(wrong + 1, int(threadIdx.x + blockDim.x * blockIdx.x));
}

void two_barriers_kernel(int*) {
  if (threadIdx.x < 7) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void early_return_kernel(int*) {
  if (threadIdx.x == 9) return;
  __syncthreads();
}

void half_warp_kernel(int*) {
  if (threadIdx.x % 32 < 16) __syncwarp();
}

void barrier_beside_collective_kernel(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncwarp();
    if (threadIdx.x % 32 < 16) __syncwarp();
  }
}

void check(const char* name, void (*kernel)(int*)) {
  for (Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
    int out[2] = {0, 0};
    machine.options = {order, 1, "", 0};
    try {
      liveweight::cuda::Launch{}(kernel, {dim3(3, 2), 96}, static_cast<int*>(out));
      std::printf("%s: %d %d\n", name, out[0], out[1]);
    } catch (const std::runtime_error& error) {
      std::printf("%s: %s\n", name, error.what());
    }
  }
}

int wrong_halves() {
  int wrong = 0;
  for (int i = 0; i < 1 << 16; ++i) {
    const uint16_t bits = uint16_t(i);
    _Float16 half;
    std::memcpy(&half, &bits, sizeof half);
    const float want = float(half), got = liveweight::cuda::to_float(liveweight::cuda::Half{bits});
    const bool same = got == want || (got != got && want != want);
    wrong += !same || std::signbit(got) != std::signbit(want);
  }
  return wrong;
}

}  // namespace

int main() {
  check("exchange", exchange_kernel);
  check("two barriers", two_barriers_kernel);
  check("early return", early_return_kernel);
  check("half warp", half_warp_kernel);
  check("barrier beside collective", barrier_beside_collective_kernel);
  std::printf("halves: %d\n", wrong_halves());
}
