// What this machine can do at best: multiply-adds between registers, and reads of a buffer.
//
// Benchmarks state a kernel's useful work as a share of the first. Every thread runs its own copy
// of the loop; the figure is the best of many short slices, because anything else that runs on the
// machine only ever slows a slice down.
#include "dispatch.h"
#include "simd.h"

LW_DECLARE(void peak_fma(int64_t rounds, const float* factors, float* sink))
LW_DECLARE(int64_t peak_flops_per_round())
LW_DECLARE(void peak_read(const float* buffer, int64_t count, float* sink))

namespace liveweight::LW_ISA {
namespace {

// More independent sums than latency (4 or 5 cycles) times units (2), fewer than registers.
constexpr int kSums = 12;
constexpr int kUnroll = 8;

}  // namespace

int64_t peak_flops_per_round() { return int64_t(2) * kSums * kUnroll * kLanes; }

void peak_fma(int64_t rounds, const float* factors, float* sink) {
  Vec sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = broadcast(float(i));
  const Vec scale = broadcast(factors[0]), shift = broadcast(factors[1]);
  for (int64_t round = 0; round < rounds; ++round) {
    for (int u = 0; u < kUnroll; ++u) {
      for (int i = 0; i < kSums; ++i) sums[i] = fma(sums[i], scale, shift);
    }
  }
  Vec total = zero();
  for (int i = 0; i < kSums; ++i) total += sums[i];
  *sink = reduce_add(total);
}

void peak_read(const float* buffer, int64_t count, float* sink) {
  Vec sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = zero();
  int64_t at = 0;
  for (; at + kSums * kLanes <= count; at += kSums * kLanes) {
    for (int i = 0; i < kSums; ++i) sums[i] += load(buffer + at + i * kLanes);
  }
  Vec total = zero();
  for (int i = 0; i < kSums; ++i) total += sums[i];
  *sink = reduce_add(total);
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
#include <algorithm>
#include <chrono>
#include <vector>

namespace liveweight {
namespace {

double seconds_now() {
  const auto time = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(time).count();
}

// Returns the best work per second that slice(thread) reaches on all threads together.
template <class Slice>
double best_rate(int64_t threads, double seconds, double work, const Slice& slice) {
  std::vector<double> rates(static_cast<size_t>(threads), 0.0);
  const double stop = seconds_now() + seconds;
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      do {
        const double start = seconds_now();
        slice(thread);
        const double took = std::max(seconds_now() - start, 1e-9);
        rates[size_t(thread)] = std::max(rates[size_t(thread)], work / took);
      } while (seconds_now() < stop);
    }
  });
  double total = 0;
  for (double rate : rates) total += rate;
  return total;
}

void check_sizes(const char* op, int64_t threads, double seconds) {
  LW_CHECK(threads >= 1 && threads <= 4096, op, ": expected threads >= 1, got ", threads);
  LW_CHECK(seconds > 0 && seconds < 600, op, ": expected seconds above 0, got ", seconds);
}

double cpu_peak(int64_t threads, double seconds) {
  check_sizes("cpu_peak", threads, seconds);
  const auto fma = LW_SELECT(peak_fma);
  const int64_t rounds = 20000, flops = rounds * LW_SELECT(peak_flops_per_round)();
  const float factors[2] = {0.5f, 1.0f};
  std::vector<float> sinks(static_cast<size_t>(threads) * 16);
  return 1e-9 * best_rate(threads, seconds, double(flops), [&](int64_t thread) {
           fma(rounds, factors, &sinks[size_t(thread) * 16]);
         });
}

double cpu_stream(int64_t bytes, int64_t threads, double seconds) {
  check_sizes("cpu_stream", threads, seconds);
  LW_CHECK(bytes >= 4096, "cpu_stream: expected at least 4096 bytes, got ", bytes);
  const auto read = LW_SELECT(peak_read);
  const int64_t count = bytes / 4;
  // Long enough against the clock: small buffers are read many times in a slice.
  const int64_t passes = std::max<int64_t>(1, (int64_t(4) << 20) / bytes);
  Workspace<float> buffers(count * threads);
  std::fill(buffers.data(), buffers.data() + count * threads, 1.0f);
  std::vector<float> sinks(static_cast<size_t>(threads) * 16);
  return 1e-9 * best_rate(threads, seconds, 4.0 * double(count * passes), [&](int64_t thread) {
           for (int64_t pass = 0; pass < passes; ++pass) {
             read(&buffers[count * thread], count, &sinks[size_t(thread) * 16]);
           }
         });
}

}  // namespace
}  // namespace liveweight

// cpu_peak returns GF/s of fp32, cpu_stream GB/s read from `bytes` per thread.
STABLE_TORCH_LIBRARY_FRAGMENT(liveweight, m) {
  m.def("cpu_peak(int threads, float seconds) -> float");
  m.def("cpu_stream(int bytes, int threads, float seconds) -> float");
}
STABLE_TORCH_LIBRARY_IMPL(liveweight, CompositeExplicitAutograd, m) {
  m.impl("cpu_peak", TORCH_BOX(&liveweight::cpu_peak));
  m.impl("cpu_stream", TORCH_BOX(&liveweight::cpu_stream));
}
#endif  // LW_BASE
