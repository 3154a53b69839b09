// fma_unless_minus_zero of ptx_shared.cuh, in all its widths.
#include "probes.cuh"
#include "ptx_shared.cuh"

namespace liveweight::cuda {
namespace {

template <int kCount>
__global__ void products_kernel(const float* value, const float* x, int n, float* sum) {
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) {
    float my_x[kCount], my_sum[kCount];
    for (int t = 0; t < kCount; ++t) {
      my_x[t] = x[i * kCount + t];
      my_sum[t] = sum[i * kCount + t];
    }
    fma_unless_minus_zero(value[i], my_x, my_sum);
    for (int t = 0; t < kCount; ++t) sum[i * kCount + t] = my_sum[t];
  }
}

// value [n], x [n, 1, 2, 4 or 8] float32; sum like x, changed in place.
void products(const Tensor& value, const Tensor& x, Tensor sum) {
  const OnDevice guard(x);
  const int64_t count = x.size(1);
  const auto kernel = count == 1   ? products_kernel<1>
                      : count == 2 ? products_kernel<2>
                      : count == 4 ? products_kernel<4>
                                   : products_kernel<8>;
  launcher(x)(kernel, Shape{grid(1), 64}, typed<const float>(value), typed<const float>(x),
              int(value.numel()), typed<float>(sum));
}

}  // namespace
}  // namespace liveweight::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(liveweight_probes, m) {
  m.def("products(Tensor value, Tensor x, Tensor(a!) sum) -> ()");
}

LW_PROBES(m) { m.impl("products", TORCH_BOX(&liveweight::cuda::products)); }
