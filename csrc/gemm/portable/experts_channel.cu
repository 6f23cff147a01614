// The portable kernels for experts with weights per channel.
#include "gemm/portable/launch.cuh"

namespace qoq::w4a8 {

template <>
void run_experts_portable<Weights::kChannel>(const ExpertParams& p, int tokens, const Card& card,
                                             int device, cudaStream_t stream) {
  portable::run_experts<Weights::kChannel>(p, tokens, card, device, stream);
}

}  // namespace qoq::w4a8
