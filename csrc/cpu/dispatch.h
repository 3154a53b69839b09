// What every CPU op file shares: declaring a kernel for all instruction sets and, in the launcher
// (LW_BASE), choosing one at run time, threads, scratch memory and argument checks.
//
// To add an op, write csrc/cpu/<op>.cpp:
//   #include "dispatch.h"
//   #include "simd.h"
//   LW_DECLARE(void my_kernel(const float* x, float* y, int64_t n))   // for all instruction sets
//   namespace liveweight::LW_ISA { void my_kernel(const float* x, ...) { ... Vec ... } }
//   #ifdef LW_BASE
//   namespace liveweight { namespace { Tensor my_op(Tensor x) { LW_CHECK(...);
//     const auto kernel = LW_SELECT(my_kernel);
//     parallel_for(n, 1, [&](int64_t begin, int64_t end) { kernel(...); }); } } }
//   STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) {
//     m.impl("my_op", TORCH_BOX(&liveweight::my_op)); }
//   #endif
// The schema goes into _library.py. Kernels see raw pointers and call nothing from std: an inline
// std template compiled here with AVX-512 flags could be linked into the code for older CPUs.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef LW_X86
#define LW_DECLARE(...)                               \
  namespace liveweight {                              \
  namespace plain { __VA_ARGS__; }                    \
  namespace avx2 { __VA_ARGS__; }                     \
  namespace avx512 { __VA_ARGS__; }                   \
  }
// Function pointer of the kernel for the instruction set in use.
#define LW_SELECT(kernel)                                                                    \
  (::liveweight::cpu_isa() == ::liveweight::Isa::avx512 ? &::liveweight::avx512::kernel      \
   : ::liveweight::cpu_isa() == ::liveweight::Isa::avx2 ? &::liveweight::avx2::kernel        \
                                                        : &::liveweight::plain::kernel)
#else
#define LW_DECLARE(...)            \
  namespace liveweight {           \
  namespace plain { __VA_ARGS__; } \
  }
#define LW_SELECT(kernel) (&::liveweight::plain::kernel)
#endif

#ifdef LW_BASE
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace liveweight {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Isa { plain, avx2, avx512 };

// The best instruction set of this CPU, or the lower one that LIVEWEIGHT_CPU names. Throws when the
// variable holds an unknown word or a set that this CPU lacks.
Isa cpu_isa();

// Floats of a Vec (simd.h) of the instruction set in use.
inline int64_t cpu_lanes() { return cpu_isa() == Isa::avx512 ? 16 : cpu_isa() == Isa::avx2 ? 8 : 4; }

template <class Error, class... Parts>
[[noreturn]] void raise(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

// LW_CHECK(x.dim() == 2, "my_op: expected 2-D x, got ", x.dim(), "-D"): guards memory, people get
// their ValueError or TypeError from Python before.
#define LW_CHECK(condition, ...)                                                             \
  do {                                                                                       \
    if (!(condition)) [[unlikely]] ::liveweight::raise<std::runtime_error>(__VA_ARGS__);     \
  } while (0)

// Shape as text, "[2, 3]", for messages.
inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

// Throws unless t is a contiguous CPU tensor of this dtype and rank; returns its data.
template <class T>
const T* checked_data(const char* op, const char* name, const Tensor& t, int64_t dim,
                      ScalarType type) {
  LW_CHECK(t.is_cpu(), op, ": expected ", name, " on the CPU");
  LW_CHECK(t.dim() == dim, op, ": expected ", dim, "-D ", name, ", got shape ", shape_of(t));
  LW_CHECK(t.scalar_type() == type, op, ": ", name, " has the wrong dtype: expected ",
           torch::headeronly::toString(type), ", got ",
           torch::headeronly::toString(t.scalar_type()));
  LW_CHECK(t.is_contiguous(), op, ": expected contiguous ", name);
  return static_cast<const T*>(t.const_data_ptr());
}

// Runs body(begin, end) over parts of [0, count) on torch's threads, at least `grain` items each.
// An exception in a worker is raised here, after all workers have ended.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (count <= grain) return body(int64_t(0), count);
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// Scratch memory of one call (or one worker): uninitialised, aligned for any Vec, never shared.
template <class T>
class Workspace {
 public:
  explicit Workspace(int64_t count)
      : data_(static_cast<T*>(::operator new(size_t(count) * sizeof(T), std::align_val_t{64}))) {}
  ~Workspace() { ::operator delete(data_, std::align_val_t{64}); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  T* data_;
};

}  // namespace liveweight
#endif  // LW_BASE
