// liveweight._pack: CSR patterns, tiles and bit masks from boolean masks, on numpy arrays. No torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

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

// One tile of a mask: where its rows keep something, rows with most entries first.
template <class T>
struct TileWriter {
  const uint8_t* mask;
  int64_t K;
  int64_t* order;
  T *columns, *segments;
  int64_t entries = 0, rows_kept = 0;

  void add(int64_t row, int64_t rows, int64_t column, int64_t width) {
    int32_t counts[256];
    int32_t most = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* line = mask + (row + r) * K + column;
      int32_t count = 0;
      for (int64_t k = 0; k < width; ++k) count += line[k] != 0;
      counts[r] = count;
      most = count > most ? count : most;
    }
    // Counting sort, stable: where[c] is the place of the next row with c entries.
    std::vector<int32_t> where(size_t(most) + 2, 0);
    for (int64_t r = 0; r < rows; ++r) ++where[size_t(most - counts[r] + 1)];
    for (size_t i = 1; i < where.size(); ++i) where[i] += where[i - 1];
    uint8_t ranked[256];
    for (int64_t r = 0; r < rows; ++r) ranked[where[size_t(most - counts[r])]++] = uint8_t(r);
    for (int64_t i = 0; i < rows && counts[ranked[i]] > 0; ++i) {
      segments[2 * rows_kept] = T(ranked[i]);
      segments[2 * rows_kept + 1] = T(counts[ranked[i]] - 1);
      ++rows_kept;
      const int64_t start = (row + ranked[i]) * K + column;
      for (int64_t k = 0; k < width; ++k) {
        if (mask[start + k] == 0) continue;
        order[entries] = start + k;
        columns[entries++] = T(k);
      }
    }
  }
};

template <class T>
py::tuple write_tiles(const Bytes& bytes, int64_t N, int64_t K, int64_t R, int64_t W, int64_t kept) {
  const int64_t along = (K + W - 1) / W, tiles = (N + R - 1) / R * along;
  py::array_t<int64_t> order(kept);
  py::array_t<T> columns(kept);
  Indices offsets({tiles + 1, int64_t(2)});
  std::vector<T> segments(size_t(std::min(kept, N * along)) * 2);
  TileWriter<T> writer{bytes.data(), K, order.mutable_data(), columns.mutable_data(), segments.data()};
  int32_t* offset = offsets.mutable_data();
  offset[0] = offset[1] = 0;
  for (int64_t row = 0; row < N; row += R) {
    for (int64_t column = 0; column < K; column += W) {
      writer.add(row, std::min(R, N - row), column, std::min(W, K - column));
      offset += 2;
      offset[0] = int32_t(writer.entries);
      offset[1] = int32_t(writer.rows_kept);
    }
  }
  py::array_t<T> used({writer.rows_kept, int64_t(2)});
  std::copy_n(segments.data(), writer.rows_kept * 2, used.mutable_data());
  return py::make_tuple(order, columns, used, offsets);
}

py::tuple tile_pattern(const py::array& mask, std::pair<int64_t, int64_t> tile) {
  const auto [R, W] = tile;
  if (mask.ndim() != 2 || R < 1 || R > 256 || W < 1 || W > 32768) {
    throw py::value_error("tile_pattern: mask must have 2 dimensions and tile be within (256, 32768)");
  }
  const Bytes bytes = as_bytes("tile_pattern", mask);
  const int64_t N = mask.shape(0), K = mask.shape(1);
  int64_t kept = 0;
  for (int64_t i = 0; i < N * K; ++i) kept += bytes.data()[i] != 0;
  if (kept > std::numeric_limits<int32_t>::max()) {
    throw py::value_error("tile_pattern: at most 2147483647 entries, got " + std::to_string(kept));
  }
  return W <= 256 ? write_tiles<uint8_t>(bytes, N, K, R, W, kept)
                  : write_tiles<int16_t>(bytes, N, K, R, W, kept);
}

}  // namespace

PYBIND11_MODULE(_pack, m) {
  m.doc() = "Host-side packers on numpy arrays.";
  m.def("csr_pattern", &csr_pattern, py::arg("mask"),
        "(row_offsets int32 [N+1], columns int32 [nnz]) of a bool or uint8 mask [N, K].");
  m.def("tile_pattern", &tile_pattern, py::arg("mask"), py::arg("tile"),
        "(order, columns, segments, offsets) of a mask [N, K] cut into tiles (rows, columns).");
  m.def("pack_bits", &pack_bits, py::arg("mask"),
        "The flattened mask, one bit each, lowest bit first: uint8 [ceil(count / 8)].");
  m.def("unpack_bits", &unpack_bits, py::arg("bits"), py::arg("count"),
        "The first count bits as uint8 0 or 1.");
}
