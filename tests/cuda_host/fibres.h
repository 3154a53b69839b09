// Fibres: threads of execution that hand over to each other by themselves, on one host thread.
//
// Each has a stack of its own, made once and used for every block that follows. Switches go through
// _setjmp and _longjmp, which leave the signal mask alone (swapcontext asks the kernel for it each
// time, 30 times the cost); under AddressSanitizer through swapcontext, which it follows.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_host {

inline constexpr size_t kStackBytes = 128 << 10;

// A place that execution can leave and come back to: a fibre, or the host thread itself (whose
// stack's bounds, for AddressSanitizer, are learned when the first fibre is entered from it).
struct Context {
  ucontext_t context;
  jmp_buf jump;
  bool started = false;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

struct Fibre : Context {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};

  void prepare(void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
    stack_bottom = stack.get();
    stack_bytes = kStackBytes;
    started = false;
  }
};

#if defined(__SANITIZE_ADDRESS__)
inline Context* left = nullptr;  // that the running context was entered from

// To be called first by whatever runs after a switch; `self` is null in a fibre's first moment.
inline void arrived(Context* self) {
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(self ? self->fake_stack : nullptr, &bottom, &bytes);
  left->stack_bottom = bottom;
  left->stack_bytes = bytes;
}

inline void switch_context(Context& from, Context& to) {
  left = &from;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_bytes);
  swapcontext(&from.context, &to.context);
  arrived(&from);
}
#else
inline void arrived(Context*) {}

inline void switch_context(Context& from, Context& to) {
  from.started = true;
  if (_setjmp(from.jump)) return;
  if (to.started) _longjmp(to.jump, 1);
  to.started = true;
  setcontext(&to.context);
}
#endif

}  // namespace cuda_host
