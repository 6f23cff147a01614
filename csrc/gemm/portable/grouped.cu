// The portable kernels for weights in groups of 128.
#include "gemm/portable/launch.cuh"

namespace qoq::w4a8 {

template <>
void run_portable<Weights::kG128>(const Params& p, const Card& card, int device,
                                  cudaStream_t stream) {
  portable::run<Weights::kG128>(p, card, device, stream);
}

}  // namespace qoq::w4a8
