// Fibres: threads of execution that hand over to each other by themselves, on one host thread.
//
// Each has a stack of its own, made once and used for every block that follows. On x86-64 a switch
// is 16 instructions, elsewhere swapcontext, which asks the kernel for the signal mask each time.
// AddressSanitizer is told of every switch.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_host {

inline constexpr size_t kStackBytes = 128 << 10;

// A place that execution can leave and come back to: a fibre, or the host thread itself (whose
// stack's bounds, for AddressSanitizer, are learned when the first fibre is entered from it).
struct Context {
  ucontext_t context;
  void* stack_pointer = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

#if defined(__x86_64__)
// Saves what a called function must preserve on the stack, and goes on where `to` was left.
__attribute__((naked, noinline)) inline void switch_stack([[maybe_unused]] void** from,
                                                          [[maybe_unused]] void* to) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}

inline void swap(Context& from, Context& to) {
  switch_stack(&from.stack_pointer, to.stack_pointer);
}
#else
inline void swap(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

struct Fibre : Context {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};

  void prepare(void (*entry)()) {
    stack_bottom = stack.get();
    stack_bytes = kStackBytes;
#if defined(__x86_64__)
    // As switch_stack left it: six registers, then where to return to; a function is entered with
    // its stack pointer 8 bytes off a 16-byte boundary.
    const uintptr_t end = reinterpret_cast<uintptr_t>(stack.get() + kStackBytes) & ~uintptr_t(15);
    auto* top = reinterpret_cast<uintptr_t*>(end) - 8;
    for (int i = 0; i < 8; ++i) top[i] = 0;
    top[6] = reinterpret_cast<uintptr_t>(entry);
    stack_pointer = top;
#else
    getcontext(&context);
    context.uc_stack.ss_sp = stack.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
#endif
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
  swap(from, to);
  arrived(&from);
}
#else
inline void arrived(Context*) {}
inline void switch_context(Context& from, Context& to) { swap(from, to); }
#endif

}  // namespace cuda_host
