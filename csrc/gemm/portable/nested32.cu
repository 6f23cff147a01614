// The portable kernels for nested weights in groups of 32.
#include "gemm/portable/launch.cuh"

namespace qoq::w4a8 {

template <>
void run_portable<Weights::kNestedG32>(const Params& p, const Card& card, int device,
                                       cudaStream_t stream) {
  portable::run<Weights::kNestedG32>(p, card, device, stream);
}

}  // namespace qoq::w4a8
