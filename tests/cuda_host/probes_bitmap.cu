// The instructions of ptx_dot.cuh on given operands; tests/csrc/test_cuda_ptx_dot.py compares.
#include "probes.cuh"
#include "ptx_dot.cuh"

namespace liveweight::cuda {
namespace {

// out[:, i] = dot4, dot2_low, dot2_high of (a, b, c)[i], and the running sum of c over its warp.
__global__ void dot_kernel(const uint32_t* a, const uint32_t* b, const uint32_t* c, int64_t n,
                           uint32_t* out) {
  const int64_t i = int64_t(blockIdx.x) * 64 + threadIdx.x;
  out[i] = dot4(a[i], b[i], c[i]);
  out[n + i] = dot2_low(a[i], b[i], c[i]);
  out[2 * n + i] = dot2_high(a[i], b[i], c[i]);
  out[3 * n + i] = running_sum(c[i]);
  const uint32_t* const four = c + i / 4 * 4;
  out[4 * n + i] = load_cached(four).word[i % 4];
}

// a, b, c [n] int32, n a multiple of 64 -> [5, n] int32.
Tensor dot(const Tensor& a, const Tensor& b, const Tensor& c) {
  const OnDevice guard(a);
  const Tensor out = empty(a, {5, a.size(0)}, ScalarType::Int);
  launcher(a)(dot_kernel, Shape{grid(a.size(0) / 64), 64}, typed<const uint32_t>(a),
              typed<const uint32_t>(b), typed<const uint32_t>(c), int64_t(a.size(0)),
              typed<uint32_t>(out));
  return out;
}

}  // namespace
}  // namespace liveweight::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(liveweight_probes, m) {
  m.def("dot(Tensor a, Tensor b, Tensor c) -> Tensor");
}

LW_PROBES(m) { m.impl("dot", TORCH_BOX(&liveweight::cuda::dot)); }
