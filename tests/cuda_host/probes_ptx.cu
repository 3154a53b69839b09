// One op per wrapper of ptx*.cuh: its operands in, what every lane got out. Words are int32 here.
#include "probes.cuh"
#include "ptx_copy.cuh"
#include "ptx_matrix.cuh"

namespace liveweight::cuda {
namespace {

// Calls body(Bf16{}) or body(Half{}).
template <typename Body>
void with_half(bool half, Body body) {
  half ? body(Half{}) : body(Bf16{});
}

template <typename T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = lane_id();
  uint32_t my_a[4], my_b[2] = {b[lane * 2], b[lane * 2 + 1]};
  float my_d[4];
  for (int i = 0; i < 4; ++i) my_a[i] = a[lane * 4 + i], my_d[i] = d[lane * 4 + i];
  mma_16816(my_d, my_a, my_b, T{});
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = my_d[i];
}

// a [32, 4], b [32, 2] int32; d [32, 4] float32, changed in place.
void mma(const Tensor& a, const Tensor& b, Tensor d, bool half) {
  const OnDevice guard(a);
  with_half(half, [&](auto type) {
    launcher(a)(mma_kernel<decltype(type)>, Shape{grid(1), 32}, typed<const uint32_t>(a),
                typed<const uint32_t>(b), typed<float>(d));
  });
}

template <typename T, int kSelector>
__global__ void mma_sp_kernel(const uint32_t* a, const uint32_t* b, const uint32_t* meta,
                              float* d) {
  const int lane = lane_id();
  uint32_t my_a[4], my_b[4];
  float my_d[4];
  for (int i = 0; i < 4; ++i) {
    my_a[i] = a[lane * 4 + i], my_b[i] = b[lane * 4 + i], my_d[i] = d[lane * 4 + i];
  }
  mma_sp_16832<kSelector>(my_d, my_a, my_b, meta[lane], T{});
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = my_d[i];
}

// a, b [32, 4], meta [32] int32; d [32, 4] float32, changed in place.
void mma_sp(const Tensor& a, const Tensor& b, const Tensor& meta, Tensor d, int64_t selector,
            bool half) {
  const OnDevice guard(a);
  with_half(half, [&](auto type) {
    using T = decltype(type);
    launcher(a)(selector ? mma_sp_kernel<T, 1> : mma_sp_kernel<T, 0>, Shape{grid(1), 32},
                typed<const uint32_t>(a), typed<const uint32_t>(b), typed<const uint32_t>(meta),
                typed<float>(d));
  });
}

__global__ void ldmatrix_kernel(const uint16_t* tile, const int* rows, uint32_t* out, bool trans) {
  LW_DYNAMIC_SHARED(memory);
  uint16_t* shared = reinterpret_cast<uint16_t*>(memory);
  const int lane = lane_id();
  for (int i = 0; i < 8; ++i) shared[lane * 8 + i] = tile[lane * 8 + i];
  __syncwarp();
  uint32_t r[4];
  if (trans) {
    ldmatrix_x4_trans(r, shared + rows[lane] * 8);
  } else {
    ldmatrix_x4(r, shared + rows[lane] * 8);
  }
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = r[i];
}

// tile [32, 8] int16, rows [32] int32 (the row whose address a lane gives) -> [32, 4] int32.
Tensor ldmatrix(const Tensor& tile, const Tensor& rows, bool trans) {
  const OnDevice guard(tile);
  const Tensor out = empty(tile, {32, 4}, ScalarType::Int);
  launcher(tile)(ldmatrix_kernel, Shape{grid(1), 32, 512}, typed<const uint16_t>(tile),
                 typed<const int>(rows), typed<uint32_t>(out), trans);
  return out;
}

// Two groups of copies, the second still on its way when the first is read.
__global__ void copy_kernel(const Vector16* from, const int* valid, Vector16* out) {
  LW_DYNAMIC_SHARED(memory);
  Vector16* shared = reinterpret_cast<Vector16*>(memory);
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  for (int half = 0; half < 2; ++half) {
    const int i = half * threads + thread;
    cp_async16(shared + i, from + i, valid[i] != 0);
    cp_async_commit();
  }
  cp_async_wait<1>();
  __syncthreads();
  const int other = threads - 1 - thread;
  out[other] = shared[other];
  cp_async_wait<0>();
  __syncthreads();
  out[threads + other] = shared[threads + other];
}

// from [128, 4] int32, valid [128] int32 -> [128, 4] int32: zeros where not valid.
Tensor copy(const Tensor& from, const Tensor& valid) {
  const OnDevice guard(from);
  const Tensor out = empty(from, {128, 4}, ScalarType::Int);
  launcher(from)(copy_kernel, Shape{grid(1), 64, 2048}, typed<const Vector16>(from),
                 typed<const int>(valid), typed<Vector16>(out));
  return out;
}

// Words, one at a time, to the other end.
__global__ void copy_words_kernel(const uint32_t* from, uint32_t* out) {
  LW_DYNAMIC_SHARED(memory);
  uint32_t* shared = reinterpret_cast<uint32_t*>(memory);
  const int thread = int(threadIdx.x);
  cp_async4(shared_address(shared + blockDim.x - 1 - threadIdx.x), from + thread);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  out[thread] = shared[thread];
}

// from [128] int32 -> [128] int32, reversed.
Tensor copy_words(const Tensor& from) {
  const OnDevice guard(from);
  const Tensor out = empty(from, {128}, ScalarType::Int);
  launcher(from)(copy_words_kernel, Shape{grid(1), 128, 512}, typed<const uint32_t>(from),
                 typed<uint32_t>(out));
  return out;
}

__global__ void round_kernel(const float* x, int64_t n, uint16_t* bf16, uint16_t* half,
                             uint32_t* bf16_pairs, uint32_t* half_pairs) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  bf16[i] = from_float<Bf16>(x[i]).bits;
  half[i] = from_float<Half>(x[i]).bits;
  bf16_pairs[i] = pack2(x[i], x[n - 1 - i], Bf16{});
  half_pairs[i] = pack2(x[i], x[n - 1 - i], Half{});
}

// x [n] float32; bf16, half [n] int16 and the pairs (x[i], x[n-1-i]) [n] int32, written in place.
void round(const Tensor& x, Tensor bf16, Tensor half, Tensor bf16_pairs, Tensor half_pairs) {
  const OnDevice guard(x);
  launcher(x)(round_kernel, Shape{grid((x.numel() + 255) / 256), 256}, typed<const float>(x),
              x.numel(), typed<uint16_t>(bf16), typed<uint16_t>(half), typed<uint32_t>(bf16_pairs),
              typed<uint32_t>(half_pairs));
}

__global__ void compare_kernel(const float* a, const float* b, int n, float* out) {
  const int i = int(threadIdx.x);
  if (i >= n) return;
  out[i] = max_nan(a[i], b[i]);
  out[n + i] = greater(a[i], b[i]);
  out[2 * n + i] = float(max_nan(double(a[i]), double(b[i])));
}

// a, b [n] float32, n <= 1024 -> [3, n]: max_nan, greater, max_nan in double.
Tensor compare(const Tensor& a, const Tensor& b) {
  const OnDevice guard(a);
  const int n = int(a.numel());
  const Tensor out = empty(a, {3, n}, ScalarType::Float);
  launcher(a)(compare_kernel, Shape{grid(1), (n + 31) / 32 * 32}, typed<const float>(a),
              typed<const float>(b), n, typed<float>(out));
  return out;
}

constexpr int kResults = 12;

__global__ void lanes_kernel(const uint32_t* x, const uint32_t* y, uint32_t* out) {
  const int lane = lane_id();
  const uint32_t a = x[lane], b = y[lane];
  const uint32_t results[kResults] = {
      shfl(a, int(b % 32)),      shfl_xor(a, 5),          shfl_up(a, 3),
      shfl_down(a, 7),           ballot(a % 3 == 0),      reduce_add(a),
      uint32_t(reduce_add(int(b))), lane_mask_lt(),       uint32_t(popc(a)),
      prmt(a, b, (a >> 7) & 0xffffu), funnel_shift(a, b, a % 64), uint32_t(lane)};
  for (int i = 0; i < kResults; ++i) out[i * 32 + lane] = results[i];
}

// x, y [32] int32 -> [12, 32] int32, in the order of the wrappers above.
Tensor lanes(const Tensor& x, const Tensor& y) {
  const OnDevice guard(x);
  const Tensor out = empty(x, {kResults, 32}, ScalarType::Int);
  launcher(x)(lanes_kernel, Shape{grid(1), 32}, typed<const uint32_t>(x), typed<const uint32_t>(y),
              typed<uint32_t>(out));
  return out;
}

template <typename T>
__global__ void widen_kernel(const Vector16* x, int vectors, float* out) {
  constexpr int kPer = 16 / int(sizeof(T));
  const int i = int(threadIdx.x);
  if (i >= vectors) return;
  float values[kPer];
  const Vector16 loaded = load_streaming(x + i);
  widen(loaded, values, T{});
  for (int k = 0; k < kPer; ++k) out[i * kPer + k] = values[k];
  if constexpr (kPer == 8) {
    const Vector8 parts[2] = {load_streaming8(x + i), load_streaming8(x[i].word + 2)};
    for (int k = 0; k < 4; ++k) {
      const uint32_t word = parts[k / 2].word[k % 2];
      out[(vectors + i) * kPer + 2 * k] = low_half(word, T{});
      out[(vectors + i) * kPer + 2 * k + 1] = high_half(word, T{});
    }
  }
}

// x [n], whole vectors -> float32 [2, n]: by widen, and by low_half and high_half (16 bits only).
Tensor widened(const Tensor& x) {
  const OnDevice guard(x);
  const Tensor out = empty(x, {2, x.numel()}, ScalarType::Float);
  with_type<float, Bf16, Half>("widened", "x", x, [&](auto zero) {
    using T = decltype(zero);
    const int vectors = int(x.numel() * int64_t(sizeof(T)) / 16);
    launcher(x)(widen_kernel<T>, Shape{grid(1), (vectors + 31) / 32 * 32},
                typed<const Vector16>(x), vectors, typed<float>(out));
  });
  return out;
}

}  // namespace
}  // namespace liveweight::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(liveweight_probes, m) {
  m.def("mma(Tensor a, Tensor b, Tensor(a!) d, bool half) -> ()");
  m.def("mma_sp(Tensor a, Tensor b, Tensor meta, Tensor(a!) d, int selector, bool half) -> ()");
  m.def("ldmatrix(Tensor tile, Tensor rows, bool trans) -> Tensor");
  m.def("copy(Tensor x, Tensor valid) -> Tensor");
  m.def("copy_words(Tensor x) -> Tensor");
  m.def("round(Tensor x, Tensor(a!) bf16, Tensor(b!) half, Tensor(c!) bf16_pairs, "
        "Tensor(d!) half_pairs) -> ()");
  m.def("compare(Tensor a, Tensor b) -> Tensor");
  m.def("lanes(Tensor x, Tensor y) -> Tensor");
  m.def("widened(Tensor x) -> Tensor");
}

LW_PROBES(m) {
  m.impl("mma", TORCH_BOX(&liveweight::cuda::mma));
  m.impl("mma_sp", TORCH_BOX(&liveweight::cuda::mma_sp));
  m.impl("ldmatrix", TORCH_BOX(&liveweight::cuda::ldmatrix));
  m.impl("copy", TORCH_BOX(&liveweight::cuda::copy));
  m.impl("copy_words", TORCH_BOX(&liveweight::cuda::copy_words));
  m.impl("round", TORCH_BOX(&liveweight::cuda::round));
  m.impl("compare", TORCH_BOX(&liveweight::cuda::compare));
  m.impl("lanes", TORCH_BOX(&liveweight::cuda::lanes));
  m.impl("widened", TORCH_BOX(&liveweight::cuda::widened));
}
