// activity_stats of csrc/cuda on the CPU: reads cases from a file, writes their results to another.
//
// A case is the header below and N * F * P elements; a result is an int32 length of an error
// message (0: none), then either the message or 4 * F doubles. `--barriers` prints the source lines
// of the barriers that the cases met.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>

#include "activity_stats.cuh"

namespace {

using namespace liveweight::cuda;

struct Header {
  int64_t rows, features, run;
  double eps;
  int32_t type;    // 0 float, 1 bfloat16, 2 half
  int32_t offset;  // elements between a 16-byte boundary and x
  int32_t order, seed, dropped_barrier;
  int32_t one_split;  // 1: long sums per thread, as only large inputs have them otherwise
};

template <typename T>
std::vector<double> run(const Header& h, std::istream& in) {
  const int64_t count = h.rows * h.features * h.run;
  // Exactly as long as the data, so that AddressSanitizer sees every access past its end.
  std::unique_ptr<char, decltype(&std::free)> storage(
      static_cast<char*>(std::malloc((count + h.offset) * sizeof(T) + (count == 0))), &std::free);
  char* base = storage.get() + h.offset * sizeof(T);
  in.read(base, count * sizeof(T));
  const T* x = reinterpret_cast<const T*>(base);
  const Extent extent{h.rows, h.features, h.run};
  Plan plan = make_plan(extent, sizeof(T), int(reinterpret_cast<uintptr_t>(x) % 16));
  if (h.one_split) {
    plan.splits = 1;
    plan.per_split = plan.columns ? h.rows : h.rows * plan.slots;
  }
  std::vector<double> stats(size_t(kStats * h.features), 0);
  // NaN, so that a partial that no thread writes shows.
  std::vector<double> partials(size_t(plan.splits * kStats * plan.width), std::nan(""));
  activity_stats(x, extent, plan, h.eps, partials.data(), stats.data(), cuda_host::Launch{});
  return stats;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return std::cerr << "usage: activity_stats_host CASES RESULTS [--barriers]\n", 2;
  std::ifstream in(argv[1], std::ios::binary);
  std::ofstream out(argv[2], std::ios::binary);
  Header h;
  while (in.read(reinterpret_cast<char*>(&h), sizeof h)) {
    cuda_host::machine.options = {cuda_host::Order(h.order), unsigned(h.seed), h.dropped_barrier};
    std::string error;
    std::vector<double> stats;
    const auto start = in.tellg();
    try {
      stats = h.type == 0   ? run<float>(h, in)
              : h.type == 1 ? run<Bf16>(h, in)
                            : run<Half>(h, in);
    } catch (const std::runtime_error& e) {
      error = e.what();
    }
    in.seekg(start + std::streamoff(h.rows * h.features * h.run * (h.type ? 2 : 4)));
    const int32_t length = int32_t(error.size());
    out.write(reinterpret_cast<const char*>(&length), sizeof length);
    out.write(error.data(), length);
    if (!length) out.write(reinterpret_cast<const char*>(stats.data()), stats.size() * 8);
  }
  if (argc > 3) {
    for (int line : cuda_host::machine.barrier_lines) std::cout << line << "\n";
  }
}
