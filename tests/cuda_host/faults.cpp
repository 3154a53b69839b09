// A kernel with the fault whose number is given, to see that the sanitizers notice it.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "launch.cuh"
#include "ptx_copy.cuh"

namespace {

using namespace liveweight::cuda;

enum Fault { kReadPast, kWritePastShared, kMisaligned, kOverflow, kCopyPast };

void kernel(const int* x, int n, int fault, int* out) {
  LW_DYNAMIC_SHARED(memory);
  int* shared = reinterpret_cast<int*>(memory);
  const int i = int(threadIdx.x);
  shared[i] = i;
  int value = shared[i];
  if (fault == kReadPast) value += x[n + i];
  if (fault == kWritePastShared) shared[32 + i] = value;
  if (fault == kMisaligned) value += *reinterpret_cast<const int*>(memory + 2);
  if (fault == kOverflow) value += 0x7fffffff;
  if (fault == kCopyPast) {
    cp_async16(shared, x + n, i == 0);
    cp_async_commit();
    cp_async_wait<0>();
  }
  __syncthreads();
  out[i] = value;
}

}  // namespace

int main(int, char** arguments) {
  const std::vector<int> x(32, 1);
  std::vector<int> out(32);
  Launch{}(kernel, Shape{grid(1), 32, 128}, x.data(), 32, std::atoi(arguments[1]), out.data());
  for (int i = 0; i < 32; ++i) {
    if (out[i] != i) return 3;
  }
  std::puts("sound");
}
