// The portable kernels for experts with weights nested, in groups of 128.
#include "gemm/portable/launch.cuh"

namespace qoq::w4a8 {

template <>
void run_experts_portable<Weights::kNestedG128>(const ExpertParams& p, int tokens, const Card& card,
                                                int device, cudaStream_t stream) {
  portable::run_experts<Weights::kNestedG128>(p, tokens, card, device, stream);
}

}  // namespace qoq::w4a8
