// The Hopper kernels for experts with weights nested, in groups of 128.
#include "gemm/hopper/launch.cuh"

namespace qoq::w4a8 {

template <>
void run_experts_hopper<Weights::kNestedG128>(const ExpertParams& p, int tokens, int device,
                                              cudaStream_t stream) {
  run_experts_on_hopper<Weights::kNestedG128>(p, tokens, device, stream);
}

}  // namespace qoq::w4a8
