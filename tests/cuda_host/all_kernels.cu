// Every kernel of csrc/cuda, instantiated without torch headers, for reading its machine code.
#include "activity_stats.cuh"

namespace liveweight::cuda {

template void activity_stats(const float*, Extent, const Plan&, double, double*, double*, Launch);
template void activity_stats(const Bf16*, Extent, const Plan&, double, double*, double*, Launch);
template void activity_stats(const Half*, Extent, const Plan&, double, double*, double*, Launch);

}  // namespace liveweight::cuda
