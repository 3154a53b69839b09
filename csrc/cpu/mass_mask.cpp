// mass_mask: per row the smallest set of scores that holds a share alpha of the row's sum.
//
// No sort: non-negative floats order like their bit patterns, so a row is split into buckets of
// neighbouring patterns, each with its sum in double; the walk from the top finds the bucket that
// crosses alpha * total, and that bucket alone is split again until one value, the pivot, is left.
#include "dispatch.h"
#include "simd.h"

LW_DECLARE(int64_t mass_rows(const float* scores, bool* keep, int64_t rows, int64_t n, double alpha,
                             bool authors_ties, uint32_t* candidates))

namespace liveweight::LW_ISA {
namespace {

constexpr int kMaxBuckets = 1024;
constexpr int64_t kFew = 24;  // candidates that are sorted instead of split

// Where the descending order crosses the target: the value, and how many of its copies are kept.
struct Pivot {
  uint32_t value;
  int64_t kept_ties, ties;
};

struct Range {
  uint32_t low, high;
  bool valid;
};

// Smallest and largest bit pattern of a row; valid unless a score is negative, NaN or infinite.
LW_INLINE Range range_of(const float* scores, int64_t n) {
  uint32_t low = 0x7fffffffu, high = 0, invalid = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float score = scores[i];
    const uint32_t pattern = float_to_bits(score) & 0x7fffffffu;  // -0 counts as 0
    invalid |= !(score >= 0.0f) | (pattern > 0x7f7fffffu);
    low = pattern < low ? pattern : low;
    high = pattern > high ? pattern : high;
  }
  return {low, high, invalid == 0};
}

// Walks one value that occurs `ties` times: how many copies reach the target from `above`.
LW_INLINE Pivot split_ties(uint32_t value, int64_t ties, double above, double target) {
  const double score = bits_to_float(value);
  int64_t kept = score > 0 ? int64_t((target - above) / score) : ties;
  kept = kept < 1 ? 1 : kept > ties ? ties : kept;
  while (kept > 1 && above + double(kept - 1) * score >= target) --kept;
  while (kept < ties && above + double(kept) * score < target) ++kept;
  return {value, kept, ties};
}

// Finishes among a few candidates: sorts them and walks down.
LW_INLINE Pivot pivot_of_few(uint32_t* values, int64_t n, double above, double target) {
  for (int64_t i = 1; i < n; ++i) {
    const uint32_t value = values[i];
    int64_t j = i;
    for (; j > 0 && values[j - 1] < value; --j) values[j] = values[j - 1];
    values[j] = value;
  }
  int64_t i = 0;
  for (;;) {
    int64_t end = i + 1;
    while (end < n && values[end] == values[i]) ++end;
    const double sum = double(end - i) * bits_to_float(values[i]);
    // Rounding may leave the target out of reach: then the last positive score is the pivot.
    if (above + sum >= target || end == n || values[end] == 0) {
      return split_ties(values[i], end - i, above, target);
    }
    above += sum;
    i = end;
  }
}

struct Buckets {
  alignas(64) double sums[2][kMaxBuckets];  // even and odd items: neighbours often share a bucket
  int used;
  int shift;
  uint32_t low;
};

// Sums the values per bucket. The buckets cover the patterns low..high.
template <class Read>
LW_INLINE void fill(Buckets& buckets, int64_t n, uint32_t low, uint32_t high, Read read) {
  int wanted = 32;
  while (wanted < kMaxBuckets && wanted * 4 < n) wanted *= 2;
  buckets.shift = 0;
  while ((high - low) >> buckets.shift >= uint32_t(wanted)) ++buckets.shift;
  buckets.used = int((high - low) >> buckets.shift) + 1;
  buckets.low = low;
  for (auto& sums : buckets.sums) {
    for (int b = 0; b < buckets.used; ++b) sums[b] = 0;
  }
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) {
    const uint32_t even = read(i), odd = read(i + 1);
    buckets.sums[0][(even - low) >> buckets.shift] += bits_to_float(even);
    buckets.sums[1][(odd - low) >> buckets.shift] += bits_to_float(odd);
  }
  if (i < n) buckets.sums[0][(read(i) - low) >> buckets.shift] += bits_to_float(read(i));
  for (int b = 0; b < buckets.used; ++b) buckets.sums[0][b] += buckets.sums[1][b];
}

// The bucket that crosses the target; *above becomes the sum of the buckets over it.
LW_INLINE int crossing(const Buckets& buckets, double target, double* above) {
  int last = -1;
  double before_last = *above, sum = *above;
  for (int b = buckets.used - 1; b >= 0; --b) {
    if (buckets.sums[0][b] == 0) continue;  // empty, or zeros only
    last = b;
    before_last = sum;
    sum += buckets.sums[0][b];
    if (sum >= target) break;
  }
  *above = before_last;
  return last;
}

// Moves the values of one bucket to `out`; *low and *high become their range.
template <class Read>
LW_INLINE int64_t collect(const Buckets& buckets, int bucket, int64_t n, Read read, uint32_t* out,
                          uint32_t* low, uint32_t* high) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t value = read(i);
    out[found] = value;
    found += int((value - buckets.low) >> buckets.shift) == bucket;
  }
  *low = 0x7fffffffu;
  *high = 0;
  for (int64_t i = 0; i < found; ++i) {
    *low = out[i] < *low ? out[i] : *low;
    *high = out[i] > *high ? out[i] : *high;
  }
  return found;
}

// The smallest double that is >= float(alpha) * float(total) once rounded to float: the authors'
// program compares sums in float32, and where a sum all but equals the limit this decides.
LW_INLINE double authors_target(double alpha, double total) {
  const float limit = float(alpha) * float(total);
  if (!(limit > 0)) return 0;                      // NaN too, 0 * inf: no sum is below it
  if (limit > __FLT_MAX__) return 0x1.ffffffp127;  // where rounding to float gives inf
  const double middle = 0.5 * (double(bits_to_float(float_to_bits(limit) - 1)) + double(limit));
  if (float(middle) >= limit) return middle;
  uint64_t pattern;
  __builtin_memcpy(&pattern, &middle, sizeof pattern);
  ++pattern;
  double next;
  __builtin_memcpy(&next, &pattern, sizeof next);
  return next;
}

// The pivot of a row with a positive score.
Pivot find_pivot(const float* scores, int64_t n, double alpha, bool authors_ties, Range range,
                 uint32_t* candidates) {
  Buckets buckets;
  const auto score_at = [=](int64_t i) { return float_to_bits(scores[i]) & 0x7fffffffu; };
  fill(buckets, n, range.low, range.high, score_at);
  double total = 0, above = 0;
  for (int b = buckets.used - 1; b >= 0; --b) total += buckets.sums[0][b];
  const double target = authors_ties ? authors_target(alpha, total) : alpha * total;
  uint32_t low, high;
  int bucket = crossing(buckets, target, &above);
  int64_t found = collect(buckets, bucket, n, score_at, candidates, &low, &high);
  const auto candidate_at = [=](int64_t i) { return candidates[i]; };
  while (low < high) {
    if (found <= kFew) return pivot_of_few(candidates, found, above, target);
    fill(buckets, found, low, high, candidate_at);
    bucket = crossing(buckets, target, &above);
    found = collect(buckets, bucket, found, candidate_at, candidates, &low, &high);
  }
  return split_ties(low, found, above, target);
}

LW_INLINE void keep_above(const float* scores, bool* keep, int64_t n, float threshold) {
  for (int64_t i = 0; i < n; ++i) keep[i] = scores[i] > threshold;
}

// Keeps everything above the pivot and the first kept_ties scores equal to it.
LW_INLINE void keep_stable(const float* scores, bool* keep, int64_t n, Pivot pivot) {
  const float value = bits_to_float(pivot.value);
  if (pivot.kept_ties == pivot.ties) {
    for (int64_t i = 0; i < n; ++i) keep[i] = scores[i] >= value;
    return;
  }
  keep_above(scores, keep, n, value);
  int64_t left = pivot.kept_ties;
  for (int64_t i = 0; left > 0; ++i) {
    if (scores[i] == value) {
      keep[i] = true;
      --left;
    }
  }
}

// The score that follows the kept ones in descending order; the smallest one where none follows.
LW_INLINE float next_score(const float* scores, int64_t n, Pivot pivot) {
  const float value = bits_to_float(pivot.value);
  if (pivot.kept_ties < pivot.ties) return value;
  float below = -1.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float score = scores[i] < value ? scores[i] : -1.0f;
    below = score > below ? score : below;
  }
  return below < 0 ? value : below;
}

// The smallest positive score with all its copies: the pivot of alpha = 1.
Pivot lowest_positive(const float* scores, int64_t n) {
  float lowest = __FLT_MAX__;
  for (int64_t i = 0; i < n; ++i) {
    const float score = scores[i] > 0 ? scores[i] : __FLT_MAX__;
    lowest = score < lowest ? score : lowest;
  }
  return {float_to_bits(lowest), 1, 1};
}

}  // namespace

// Returns -1, or the first row that holds a negative, NaN or infinite score.
int64_t mass_rows(const float* scores, bool* keep, int64_t rows, int64_t n, double alpha,
                  bool authors_ties, uint32_t* candidates) {
  for (int64_t row = 0; row < rows; ++row, scores += n, keep += n) {
    const Range range = range_of(scores, n);
    if (!range.valid) return row;
    if (range.high == 0 || (alpha == 0 && !authors_ties)) {
      __builtin_memset(keep, 0, size_t(n));
      continue;
    }
    const Pivot pivot = alpha == 1 && !authors_ties
                            ? lowest_positive(scores, n)
                            : find_pivot(scores, n, alpha, authors_ties, range, candidates);
    if (authors_ties) {
      keep_above(scores, keep, n, next_score(scores, n, pivot));
    } else {
      keep_stable(scores, keep, n, pivot);
    }
  }
  return -1;
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
#include <algorithm>

namespace liveweight {
namespace {

// Bit j of word w of a row is column 32 w + j; bits past the end are 0.
Tensor pack_rows(const Tensor& mask) {
  const int64_t R = mask.size(0), n = mask.size(1), words = (n + 31) / 32;
  Tensor bits = torch::stable::new_empty(mask, {R, words}, ScalarType::Int);
  if (R * n == 0) return bits;
  const uint8_t* keep = static_cast<const uint8_t*>(mask.const_data_ptr());
  uint32_t* out = static_cast<uint32_t*>(bits.mutable_data_ptr());
  parallel_for(R, 1 + 16384 / n, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t w = 0; w < words; ++w) {
        uint32_t word = 0;
        const int64_t first = 32 * w, count = n - first < 32 ? n - first : 32;
        for (int64_t j = 0; j < count; ++j) word |= uint32_t(keep[row * n + first + j]) << j;
        out[row * words + w] = word;
      }
    }
  });
  return bits;
}

Tensor mass_mask(Tensor scores, double alpha, bool authors_ties, bool packed) {
  const float* data = checked_data<float>("mass_mask", "scores", scores, 2, ScalarType::Float);
  LW_CHECK(alpha >= 0 && alpha <= 1, "mass_mask: expected alpha in [0, 1], got ", alpha);
  const int64_t R = scores.size(0), n = scores.size(1);
  Tensor mask = torch::stable::new_empty(scores, {R, n}, ScalarType::Bool);
  if (R * n == 0) return packed ? pack_rows(mask) : mask;
  bool* keep = static_cast<bool*>(mask.mutable_data_ptr());
  const auto kernel = LW_SELECT(mass_rows);
  std::atomic<int64_t> invalid{R};
  parallel_for(R, 1 + 16384 / n, [&](int64_t begin, int64_t end) {
    Workspace<uint32_t> candidates(n);
    const int64_t bad = kernel(data + begin * n, keep + begin * n, end - begin, n, alpha,
                               authors_ties, candidates.data());
    int64_t first = invalid.load();
    while (bad >= 0 && begin + bad < first && !invalid.compare_exchange_weak(first, begin + bad)) {
    }
  });
  if (invalid < R) {
    raise<std::invalid_argument>("mass_mask: scores must be finite and >= 0, row ", invalid.load(),
                                 " holds a negative, NaN or infinite one");
  }
  return packed ? pack_rows(mask) : mask;
}

}  // namespace
}  // namespace liveweight

STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) {
  m.impl("mass_mask", TORCH_BOX(&liveweight::mass_mask));
}
#endif  // LW_BASE
