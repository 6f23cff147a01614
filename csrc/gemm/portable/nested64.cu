// The portable kernels for nested weights in groups of 64.
#include "gemm/portable/launch.cuh"

namespace qoq::w4a8 {

template <>
void run_portable<Weights::kNestedG64>(const Params& p, const Card& card, int device,
                                       cudaStream_t stream) {
  portable::run<Weights::kNestedG64>(p, card, device, stream);
}

}  // namespace qoq::w4a8
