// Checks activation.h against double precision, for the instruction set it is compiled for.
// Built and run by test_isa.py; prints the greatest errors and returns 1 where one is too large.
#include "activation.h"

#include <cmath>
#include <cstdio>

using namespace liveweight;
using namespace liveweight::LW_ISA;

static double exact(float x, int code) {
  const double v = x;
  if (code == kRelu) return v < 0 ? 0 : v;
  if (code == kGelu) return 0.5 * v * std::erfc(-v / std::sqrt(2.0));
  if (code == kGeluTanh) {
    return v / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
  }
  return v;
}

struct Errors {
  double relative[kActivations] = {};
  int wrong = 0;
  float worst[kActivations] = {};

  void look(float x, int code, float got) {
    const double wanted = exact(x, code);
    if (std::isnan(x) || std::isinf(x)) {
      const bool none = std::isnan(x) || (x < 0 && (code == kGelu || code == kGeluTanh));
      wrong += none ? !std::isnan(got) : double(got) != wanted;
      return;
    }
    const double error = std::fabs(got - wanted);
    if (error < 1e-37) return;
    const double relative_error = error / std::fabs(wanted);
    if (!(relative_error <= relative[code])) relative[code] = relative_error, worst[code] = x;
  }
};

template <int N>
static void check_lanes(const float* x, Errors& errors) {
  for (int code = 0; code < kActivations; ++code) {
    const Lanes<N> y = activate_lanes(load_lanes<N>(x), code);
    for (int i = 0; i < N; ++i) errors.look(x[i], code, y[i]);
  }
}

static void check(const float* x, Errors& errors) {
  for (int code = 0; code < kActivations; ++code) {
    float y[kLanes];
    store(y, activate(load(x), code));
    for (int i = 0; i < kLanes; ++i) errors.look(x[i], code, y[i]);
    errors.look(x[0], code, activate(x[0], code));
  }
  check_lanes<4>(x, errors);
  check_lanes<8>(x, errors);
  check_lanes<16>(x, errors);
}

int main() {
  Errors errors;
  const float special[16] = {0, -0.0f, INFINITY, -INFINITY, NAN,    -NAN,   1e-40f, -1e-40f,
                             1, -1,    3e38f,    -3e38f,    1e-30f, -1e-30f, 20,     -20};
  check(special, errors);
  // Every 9973rd number up to 64, both signs, all exponents down to the subnormal ones.
  float block[16];
  int filled = 0;
  for (uint32_t pattern = 1; pattern < float_to_bits(64.0f); pattern += 9973) {
    block[filled++] = bits_to_float(pattern);
    block[filled++] = -bits_to_float(pattern);
    if (filled == 16) check(block, errors), filled = 0;
  }
  const double limit[kActivations] = {0, 0, 1e-6, 1.5e-5};
  for (int code = 0; code < kActivations; ++code) {
    std::printf("activation %d: relative error %.2g at %g\n", code, errors.relative[code], errors.worst[code]);
    errors.wrong += errors.relative[code] > limit[code];
  }
  std::printf("%d lanes, %d failures\n", kLanes, errors.wrong);
  return errors.wrong != 0;
}
