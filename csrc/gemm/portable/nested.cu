// The portable kernels for nested weights in groups of 128.
#include "gemm/portable/launch.cuh"

namespace qoq::w4a8 {

template <>
void run_portable<Weights::kNestedG128>(const Params& p, const Card& card, int device,
                                        cudaStream_t stream) {
  portable::run<Weights::kNestedG128>(p, card, device, stream);
}

}  // namespace qoq::w4a8
