// Loads of ptx.cuh and ptx_shared.cuh, and sqrt.approx: every one copies what it was given.
#include "probes.cuh"
#include "ptx_shared.cuh"

namespace liveweight::cuda {
namespace {

constexpr int kWays = 7;

// out[way, i] is word i of x, loaded in one of seven ways; n is a multiple of 128.
__global__ void loads_kernel(const uint32_t* x, int n, uint32_t* out) {
  LW_DYNAMIC_SHARED(memory);
  uint32_t* staged = reinterpret_cast<uint32_t*>(memory);
  const int thread = int(threadIdx.x);
  for (int i = thread; i < n; i += int(blockDim.x)) staged[i] = x[i];
  __syncthreads();
  const SharedAddress base = shared_address(memory);
  for (int i = thread; i < n; i += int(blockDim.x)) {
    out[i] = load_word(x + i);
    out[n + i] = load_streaming8(x + i / 2 * 2).word[i % 2];
    const float value = load_global(reinterpret_cast<const float*>(x + i));
    memcpy(out + 2 * n + i, &value, 4);
    const Half* halves = reinterpret_cast<const Half*>(x + i);
    out[3 * n + i] = uint32_t(load_global(halves + 1).bits) << 16 | load_global(halves).bits;
    uint32_t one[1], low[1], two[2], four[4];
    load_shared(base + 4 * i, one);
    out[4 * n + i] = one[0];
    load_shared(base + 4 * i, low, uint16_t{});
    load_shared(base + 4 * i + 2, one, uint16_t{});
    out[5 * n + i] = one[0] << 16 | low[0];
    load_shared(base + i / 2 * 8, two);
    load_shared(base + i / 4 * 16, four);
    out[6 * n + i] = two[i % 2] == four[i % 4] ? two[i % 2] : ~x[i];
  }
}

// x [n] int32 with n a multiple of 4 -> [7, n] int32.
Tensor loads(const Tensor& x) {
  const OnDevice guard(x);
  const int n = int(x.numel());
  const Tensor out = empty(x, {kWays, n}, ScalarType::Int);
  launcher(x)(loads_kernel, Shape{grid(1), 64, 4 * n}, typed<const uint32_t>(x), n,
              typed<uint32_t>(out));
  return out;
}

__global__ void roots_kernel(const float* x, int n, float* out) {
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) out[i] = square_root(x[i]);
}

// x [n] float32 -> [n]
Tensor roots(const Tensor& x) {
  const OnDevice guard(x);
  const Tensor out = empty(x, {x.numel()}, ScalarType::Float);
  launcher(x)(roots_kernel, Shape{grid(1), 64}, typed<const float>(x), int(x.numel()),
              typed<float>(out));
  return out;
}

}  // namespace
}  // namespace liveweight::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(liveweight_probes, m) {
  m.def("loads(Tensor x) -> Tensor");
  m.def("roots(Tensor x) -> Tensor");
}

LW_PROBES(m) {
  m.impl("loads", TORCH_BOX(&liveweight::cuda::loads));
  m.impl("roots", TORCH_BOX(&liveweight::cuda::roots));
}
