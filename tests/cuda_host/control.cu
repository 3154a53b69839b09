// How the tests steer the emulator: plain C functions, called from emulated.py.
#include <string>

#define LW_EXPORT extern "C" __attribute__((visibility("default")))

using cuda_host::machine;

LW_EXPORT void lw_emulated_order(int order, unsigned seed) {
  machine.options.order = cuda_host::Order(order);
  machine.options.seed = seed;
}

LW_EXPORT void lw_emulated_drop(const char* file, int line) {
  machine.options.dropped_file = file;
  machine.options.dropped_line = line;
}

// "file:line" of every barrier met, one a line; valid until the next call.
LW_EXPORT const char* lw_emulated_barriers() {
  static std::string text;
  text.clear();
  for (const auto& [file, line] : machine.barriers_met) {
    text += file + ":" + std::to_string(line) + "\n";
  }
  return text.c_str();
}
