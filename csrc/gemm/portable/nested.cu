// The portable kernels for nested weights.
#include "gemm/portable/launch.cuh"

namespace qoq::w4a8 {

template <>
void run_portable<Weights::kNested>(const Params& p, const Card& card, int device,
                                    cudaStream_t stream) {
  portable::run<Weights::kNested>(p, card, device, stream);
}

}  // namespace qoq::w4a8
