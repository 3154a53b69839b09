// Checks every function of simd.h against scalar code, for the instruction set it is compiled for.
// Built and run by test_isa.py; prints the first difference and returns 1.
#include "simd.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>

using namespace liveweight;
using namespace liveweight::LW_ISA;

static int failures = 0;

static void expect(const char* what, int lane, float got, float wanted) {
  const bool same = got == wanted || (std::isnan(got) && std::isnan(wanted));
  if (!same && failures++ == 0) std::printf("%s lane %d: got %g, expected %g\n", what, lane, got, wanted);
}

template <class Wanted>
static void expect_lanes(const char* what, Vec got, Wanted wanted) {
  float lanes[kLanes];
  store(lanes, got);
  for (int i = 0; i < kLanes; ++i) expect(what, i, lanes[i], wanted(i));
}

static void check_partial(const float* a, const float* b) {
  for (int n = 0; n <= kLanes; ++n) {
    // Exactly n values on the heap: a read past them is caught where this runs under a sanitizer.
    float* exact = static_cast<float*>(std::malloc(size_t(n) * 4 + 1));
    Bf16* brain = static_cast<Bf16*>(std::malloc(size_t(n) * 2 + 1));
    for (int i = 0; i < n; ++i) exact[i] = a[i], brain[i].bits = uint16_t(float_to_bits(a[i]) >> 16);
    expect_lanes("load_first", load_first(exact, n), [&](int i) { return i < n ? a[i] : 0.0f; });
    expect_lanes("load_first bf16", load_first(brain, n),
                 [&](int i) { return i < n ? to_float(brain[i]) : 0.0f; });
    expect("first", n, float(bits(first(n))), float((1u << n) - 1));
    store_first(exact, load(b), n);
    for (int i = 0; i < n; ++i) expect("store_first", i, exact[i], b[i]);
    store_first(brain, load(b), n);
    for (int i = 0; i < n; ++i) expect("store_first bf16", i, to_float(brain[i]), to_float(to_bf16(b[i])));
    std::free(exact);
    std::free(brain);
  }
}

// Every upper half with lower halves below, at and above the middle between two bf16.
static void check_rounding() {
  const uint32_t lows[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
  for (uint32_t high = 0; high < 65536; ++high) {
    for (const uint32_t low : lows) {
      const float value = bits_to_float(high << 16 | low);
      const bool up = low > 0x8000 || (low == 0x8000 && (high & 1));
      const float wanted = std::isnan(value) ? value : to_float(Bf16{uint16_t(high + up)});
      expect("to_bf16", int(high), to_float(to_bf16(value)), wanted);
      Bf16 stored[kLanes];
      store(stored, broadcast(value));
      for (int i = 0; i < kLanes; ++i) expect("store bf16", int(high), to_float(stored[i]), wanted);
    }
  }
}

static void check_masks(const float* a, const float* b, const int32_t* index) {
  for (uint32_t m = 0; m < (1u << kLanes); m += kLanes > 8 ? 37 : 1) {
    const auto on = [&](int i) { return (m >> i & 1) != 0; };
    expect("bits", 0, float(bits(mask_from_bits(m))), float(m));
    expect_lanes("load mask", load(a, mask_from_bits(m)), [&](int i) { return on(i) ? a[i] : 0.0f; });
    expect_lanes("select", select(mask_from_bits(m), load(a), load(b)),
                 [&](int i) { return on(i) ? a[i] : b[i]; });
    expect_lanes("expand_load", expand_load(a, m), [&](int i) {
      return on(i) ? a[popcount(m & ((1u << i) - 1))] : 0.0f;
    });
    Bf16 brains[kLanes];
    for (int i = 0; i < kLanes; ++i) brains[i] = to_bf16(a[i]);
    expect_lanes("expand_load bf16", expand_load(brains, m), [&](int i) {
      return on(i) ? to_float(brains[popcount(m & ((1u << i) - 1))]) : 0.0f;
    });
    float sums[kLanes];
    store(sums, fma(load(a), load(b), load(b)));
    expect_lanes("fma mask", fma(load(a), load(b), load(b), mask_from_bits(m)),
                 [&](int i) { return on(i) ? sums[i] : b[i]; });
    float out[kLanes];
    store(out, load(b));
    store(out, load(a), mask_from_bits(m));
    expect_lanes("store mask", load(out), [&](int i) { return on(i) ? a[i] : b[i]; });
  }
  for (int n = 0; n <= kLanes; ++n) {
    expect_lanes("gather n", gather(a, index, n), [&](int i) { return i < n ? a[index[i]] : 0.0f; });
  }
}

static void check_halves() {
  for (uint32_t h = 0; h < 65536; h += kLanes) {
    Half halves[kLanes];
    Bf16 brains[kLanes];
    for (int i = 0; i < kLanes; ++i) halves[i].bits = brains[i].bits = uint16_t(h + uint32_t(i));
    const auto wanted = [&](int i) {
      const uint32_t u = halves[i].bits, e = u >> 10 & 31, f = u & 1023;
      const float size = e == 31 ? (f ? NAN : INFINITY)
                         : e == 0 ? std::ldexp(float(f), -24)
                                  : std::ldexp(float(1024 + f), int(e) - 25);
      return u & 0x8000 ? -size : size;
    };
    expect_lanes("half", load(halves), wanted);
    for (int i = 0; i < kLanes; ++i) expect("to_float half", int(h) + i, to_float(halves[i]), wanted(i));
    expect_lanes("bf16", load(brains), [&](int i) { return bits_to_float(uint32_t(brains[i].bits) << 16); });
  }
}

int main() {
  float a[kLanes], b[kLanes];
  int32_t index[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    a[i] = float(i * 7 % kLanes) - 3.5f;
    b[i] = 2.25f - float(i * 3 % kLanes);
    index[i] = (i * 5 + 2) % kLanes;
  }
  const Vec va = load(a), vb = load(b);
  expect_lanes("zero", zero(), [](int) { return 0.0f; });
  expect_lanes("broadcast", broadcast(1.5f), [](int) { return 1.5f; });
  expect_lanes("add", va + vb, [&](int i) { return a[i] + b[i]; });
  expect_lanes("sub", va - vb, [&](int i) { return a[i] - b[i]; });
  expect_lanes("mul", va * vb, [&](int i) { return a[i] * b[i]; });
  expect_lanes("fma", fma(va, vb, va), [&](int i) { return a[i] * b[i] + a[i]; });
  expect_lanes("max", max(va, vb), [&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
  expect_lanes("min", min(va, vb), [&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
  expect_lanes("abs", abs(va), [&](int i) { return std::fabs(a[i]); });
  expect_lanes("relu", relu(va), [&](int i) { return a[i] > 0 ? a[i] : 0.0f; });
  expect_lanes("relu nan", relu(broadcast(NAN)), [](int) { return NAN; });
  expect_lanes("max nan", max(broadcast(NAN), va), [&](int i) { return a[i]; });
  expect_lanes("max nan b", max(va, broadcast(NAN)), [](int) { return NAN; });
  expect_lanes("count_greater", count_greater(broadcast(2), va, vb),
               [&](int i) { return a[i] > b[i] ? 3.0f : 2.0f; });
  expect_lanes("gather", gather(a, index), [&](int i) { return a[index[i]]; });
  float sum = 0, top = a[0];
  for (float value : a) sum += value, top = value > top ? value : top;
  expect("reduce_add", 0, reduce_add(va), sum);
  expect("reduce_max", 0, reduce_max(va), top);
  check_partial(a, b);
  check_rounding();
  check_masks(a, b, index);
  check_halves();
  std::printf("%d lanes, %d failures\n", kLanes, failures);
  return failures != 0;
}
