// The portable kernels for weights with groups.
#include "gemm/portable/launch.cuh"

namespace qoq::w4a8 {

template <>
void run_portable<Weights::kGrouped>(const Params& p, const Card& card, int device,
                                     cudaStream_t stream) {
  portable::run<Weights::kGrouped>(p, card, device, stream);
}

}  // namespace qoq::w4a8
