// liveweight._pack: CSR patterns and bit masks from boolean masks, on numpy arrays. No torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Indices = py::array_t<int32_t, py::array::c_style>;

// The mask's bytes, 0 or not 0; a bool array is read in place.
Bytes as_bytes(const char* function, const py::array& mask) {
  if (mask.itemsize() != 1 || (mask.dtype().kind() != 'b' && mask.dtype().kind() != 'u')) {
    throw py::type_error(std::string(function) + ": mask must be bool or uint8, got " +
                         py::str(mask.dtype()).cast<std::string>());
  }
  return Bytes::ensure(mask.attr("view")("uint8"));
}

// Eight mask bytes as one word of bits: bit i is set where byte i is not 0.
inline uint8_t bits_of(const uint8_t* mask) {
  uint8_t bits = 0;
  for (int i = 0; i < 8; ++i) bits = uint8_t(bits | (mask[i] != 0) << i);
  return bits;
}

py::tuple csr_pattern(const py::array& mask) {
  if (mask.ndim() != 2) {
    throw py::value_error("csr_pattern: mask must have 2 dimensions, got " +
                          std::to_string(mask.ndim()));
  }
  const Bytes bytes = as_bytes("csr_pattern", mask);
  const int64_t N = mask.shape(0), K = mask.shape(1);
  const uint8_t* data = bytes.data();
  int64_t kept = 0;
  for (int64_t i = 0; i < N * K; ++i) kept += data[i] != 0;
  if (kept > std::numeric_limits<int32_t>::max() || K > std::numeric_limits<int32_t>::max()) {
    throw py::value_error("csr_pattern: int32 indices hold at most 2147483647 entries, columns; " +
                          ("got " + std::to_string(kept)) + " entries, " + std::to_string(K) +
                          " columns");
  }
  Indices row_offsets(N + 1), columns(kept);
  int32_t* offset = row_offsets.mutable_data();
  int32_t* column = columns.mutable_data();
  offset[0] = 0;
  int32_t at = 0;
  for (int64_t row = 0; row < N; ++row, data += K) {
    int64_t k = 0;
    for (; k + 8 <= K; k += 8) {
      for (unsigned bits = bits_of(data + k); bits != 0; bits &= bits - 1) {
        column[at++] = int32_t(k) + __builtin_ctz(bits);
      }
    }
    for (; k < K; ++k) {
      if (data[k]) column[at++] = int32_t(k);
    }
    offset[row + 1] = at;
  }
  return py::make_tuple(row_offsets, columns);
}

Bytes pack_bits(const py::array& mask) {
  const Bytes bytes = as_bytes("pack_bits", mask);
  const uint8_t* data = bytes.data();
  const int64_t count = bytes.size();
  Bytes packed((count + 7) / 8);
  uint8_t* out = packed.mutable_data();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) *out++ = bits_of(data + i);
  if (i < count) {
    uint8_t last[8] = {};
    std::memcpy(last, data + i, size_t(count - i));
    *out = bits_of(last);
  }
  return packed;
}

Bytes unpack_bits(const py::array& bits, int64_t count) {
  const Bytes packed = as_bytes("unpack_bits", bits);
  if (count < 0 || packed.size() != (count + 7) / 8) {
    throw py::value_error("unpack_bits: " + std::to_string(count) + " bits need " +
                          std::to_string((count + 7) / 8) + " bytes, got " +
                          std::to_string(packed.size()));
  }
  const uint8_t* data = packed.data();
  Bytes mask(count);
  uint8_t* out = mask.mutable_data();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int bit = 0; bit < 8; ++bit) out[i + bit] = data[i >> 3] >> bit & 1;
  }
  for (; i < count; ++i) out[i] = data[i >> 3] >> (i & 7) & 1;
  return mask;
}

}  // namespace

PYBIND11_MODULE(_pack, m) {
  m.doc() = "Host-side packers on numpy arrays.";
  m.def("csr_pattern", &csr_pattern, py::arg("mask"),
        "(row_offsets int32 [N+1], columns int32 [nnz]) of a bool or uint8 mask [N, K].");
  m.def("pack_bits", &pack_bits, py::arg("mask"),
        "The flattened mask, one bit each, lowest bit first: uint8 [ceil(count / 8)].");
  m.def("unpack_bits", &unpack_bits, py::arg("bits"), py::arg("count"),
        "The first count bits as uint8 0 or 1.");
}
