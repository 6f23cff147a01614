// The portable kernels for experts with weights in groups of 128.
#include "gemm/portable/launch.cuh"

namespace qoq::w4a8 {

template <>
void run_experts_portable<Weights::kG128>(const ExpertParams& p, int tokens, const Card& card,
                                          int device, cudaStream_t stream) {
  portable::run_experts<Weights::kG128>(p, tokens, card, device, stream);
}

}  // namespace qoq::w4a8
