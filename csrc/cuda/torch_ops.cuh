// What the launchers of csrc/cuda/*.cu share: checks, allocation, the stream, registration.
//
// Only PyTorch's stable ABI. Compiled by nvcc the ops belong to (liveweight, CUDA); compiled by g++
// over tests/cuda_host, launcher and all, to (liveweight_emulated, CPU).
#pragma once

#include "launch.cuh"
#include "ptx.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <type_traits>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 has only the other spelling
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

#if defined(__CUDACC__)
#define LW_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(liveweight, CUDA, m)
#else
#define LW_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(liveweight_emulated, CPU, m)
#endif

namespace liveweight::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::initializer_list<int64_t>;

// Raises "op: argument ..." unless the condition holds.
template <typename... Parts>
void require(bool condition, const char* op, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << op << ": ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

// Makes x's GPU the current one for as long as it lives.
#if defined(__CUDACC__)
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};
#else
class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}
};
#endif

// Launches on the current stream of x's GPU, which an OnDevice must have made the current one.
inline Launch launcher(const Tensor& x) {
#if defined(__CUDACC__)
  const int device = x.get_device_index();
  int major = 0, minor = 0;
  Launch::check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  Launch::check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  require(major >= 8, "liveweight", "the CUDA kernels need compute capability 8.0, GPU ", device,
          " has ", major, ".", minor);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return Launch{static_cast<cudaStream_t>(stream)};
#else
  (void)x;
  return Launch{nullptr};
#endif
}

inline bool on_same_device(const Tensor& a, const Tensor& b) {
#if defined(__CUDACC__)
  return a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index();
#else
  return a.is_cpu() && b.is_cpu();
#endif
}

inline const void* address(const Tensor& x) { return x.const_data_ptr(); }

// Bytes by which x is off a 16-byte boundary.
inline int misalignment(const Tensor& x) {
  return int(reinterpret_cast<uintptr_t>(address(x)) % 16);
}

inline std::string shape_text(const Tensor& x) {
  std::ostringstream out;
  out << "[";
  for (int64_t i = 0; i < x.dim(); ++i) out << (i ? ", " : "") << x.size(i);
  out << "]";
  return out.str();
}

inline std::string shape_text(Sizes sizes) {
  std::ostringstream out;
  const char* separator = "[";
  for (const int64_t size : sizes) {
    out << separator << (size < 0 ? "*" : std::to_string(size));
    separator = ", ";
  }
  out << (sizes.size() ? "]" : "[]");
  return out.str();
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, Sizes sizes) {
  bool right = tensor.dim() == int64_t(sizes.size());
  int64_t i = 0;
  for (const int64_t size : sizes) {
    right = right && (size < 0 || tensor.size(i) == size);
    ++i;
  }
  require(right, op, name, " must have shape ", shape_text(sizes), ", got ", shape_text(tensor));
}

// Raises unless the tensor has this dtype and shape (-1: any size), is contiguous and lies on the
// device of `like`, a GPU; with `aligned` also unless it begins on a 16-byte boundary.
inline void check_tensor(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                         Sizes sizes, const Tensor& like, bool aligned = false) {
  require(tensor.scalar_type() == dtype, op, name, " must be ", torch::headeronly::toString(dtype),
          ", got ", torch::headeronly::toString(tensor.scalar_type()));
  require(on_same_device(tensor, like), op, name, " must be on the GPU of the first tensor");
  check_shape(op, name, tensor, sizes);
  require(tensor.is_contiguous(), op, name, " must be contiguous");
  require(!aligned || misalignment(tensor) == 0, op, name,
          " must begin on a 16-byte boundary, got an offset of ", misalignment(tensor), " bytes");
}

// The same for an argument that may be absent.
inline void check_tensor(const char* op, const char* name, const std::optional<Tensor>& tensor,
                         ScalarType dtype, Sizes sizes, const Tensor& like, bool aligned = false) {
  if (tensor) check_tensor(op, name, *tensor, dtype, sizes, like, aligned);
}

// The elements: typed<const float>(x) to read them, typed<float>(x) to write them.
template <typename T>
T* typed(const Tensor& x) {
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(x.const_data_ptr());
  } else {
    return static_cast<T*>(x.mutable_data_ptr());
  }
}

template <typename T>
T* typed(const std::optional<Tensor>& x) {
  return x ? typed<T>(*x) : nullptr;
}

// A new tensor on the device of `like`, from torch's allocator (so a CUDA graph can hold it). What
// no kernel writes is garbage; in the emulator it is always NaN or -1.
inline Tensor empty(const Tensor& like, Sizes sizes, ScalarType dtype) {
  Tensor out = torch::stable::new_empty(
      like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
#if !defined(__CUDACC__)
  if (out.numel()) std::memset(out.mutable_data_ptr(), 0xff, out.numel() * out.element_size());
#endif
  return out;
}

template <typename T>
constexpr ScalarType scalar_type() {
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, Bf16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<T, Half>) return ScalarType::Half;
}

// Calls body(T{}) with the one of Types that is x's dtype:
//   with_type<float, Bf16, Half>("my_op", "x", x, [&](auto zero) { run<decltype(zero)>(x); });
template <typename... Types, typename Body>
void with_type(const char* op, const char* name, const Tensor& x, Body body) {
  const ScalarType dtype = x.scalar_type();
  const bool found =
      ((dtype == scalar_type<Types>() ? (body(Types{}), true) : false) || ...);
  if (found) return;
  std::ostringstream wanted;
  const char* separator = "";
  ((wanted << separator << torch::headeronly::toString(scalar_type<Types>()), separator = " or "),
   ...);
  require(false, op, name, " must be ", wanted.str(), ", got ",
          torch::headeronly::toString(dtype));
}

}  // namespace liveweight::cuda
