// Which instruction set the CPU kernels run with.
#include "dispatch.h"

#ifdef LW_BASE
namespace liveweight {
namespace {

bool supported(Isa isa) {
#ifdef LW_X86
  __builtin_cpu_init();
  // F16C has no portable query, but every CPU with AVX2 and FMA has it.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return isa == Isa::plain;
}

const char* name_of(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "plain";
}

Isa choose() {
  const char* wish = std::getenv("LIVEWEIGHT_CPU");
  const bool any = wish == nullptr || *wish == '\0';
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::plain}) {
    if (any ? supported(isa) : std::string(wish) == name_of(isa)) {
      LW_CHECK(supported(isa), "LIVEWEIGHT_CPU=", wish, ": this CPU does not support it");
      return isa;
    }
  }
  raise<std::runtime_error>("LIVEWEIGHT_CPU: expected avx512, avx2 or plain, got ", wish);
}

std::string cpu_isa_name() { return name_of(cpu_isa()); }

}  // namespace

Isa cpu_isa() {
  static const Isa chosen = choose();  // a throw leaves it unset: the next call throws again
  return chosen;
}

}  // namespace liveweight

STABLE_TORCH_LIBRARY_FRAGMENT(liveweight, m) { m.def("cpu_isa() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(liveweight, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&liveweight::cpu_isa_name));
}
#endif  // LW_BASE
