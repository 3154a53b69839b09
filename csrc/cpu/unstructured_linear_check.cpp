// Whether the segments of a tiled pattern fit its offsets: what guards memory, for every call.
#include "unstructured_linear.h"

namespace liveweight::LW_ISA {

// Largest row and number of entries of `count` segments. A pair is read as one word, so that the
// compiler turns the loop into vectors.
template <class Index, class Pair>
LW_INLINE void survey(const Index* segments, int64_t count, uint32_t& row, uint64_t& entries) {
  constexpr int kBits = 8 * sizeof(Index);
  Pair most = 0;
  uint32_t sum = 0;  // of at most 256 rows of at most 32768 entries each, where the pattern is sound
  for (int64_t i = 0; i < count; ++i) {
    Pair pair;
    __builtin_memcpy(&pair, segments + 2 * i, sizeof pair);
    const Pair place = pair & Pair((Pair(1) << kBits) - 1);
    most = place > most ? place : most;
    sum += uint32_t(pair >> kBits);
  }
  row = most;
  entries = uint64_t(sum) + uint64_t(count);
}

template <class Index, class Pair>
bool agrees(const Tiles& w, int64_t tiles) {
  const Index* segments = static_cast<const Index*>(w.segments);
  const int32_t* last = w.offsets + 2 * tiles;
  for (int64_t i = 0; i < tiles; ++i) {
    const int32_t *at = w.offsets + 2 * i, *next = at + 2;
    const bool rise = at[0] <= next[0] && next[0] <= last[0] && at[1] <= next[1] && next[1] <= last[1];
    if (!rise || next[1] - at[1] > w.rows) return false;
    uint32_t row;
    uint64_t entries;
    survey<Index, Pair>(segments + 2 * int64_t(at[1]), next[1] - at[1], row, entries);
    if (entries != uint64_t(next[0] - at[0]) || row >= w.rows) return false;
  }
  return true;
}

bool linear_agrees(const Tiles& w, int64_t tiles) {
  return w.wide ? agrees<uint16_t, uint32_t>(w, tiles) : agrees<uint8_t, uint16_t>(w, tiles);
}

}  // namespace liveweight::LW_ISA
