// The portable kernels for weights per channel.
#include "gemm/portable/launch.cuh"

namespace qoq::w4a8 {

template <>
void run_portable<Weights::kChannel>(const Params& p, const Card& card, int device,
                                     cudaStream_t stream) {
  portable::run<Weights::kChannel>(p, card, device, stream);
}

}  // namespace qoq::w4a8
