// The Hopper kernels for experts with weights per channel.
#include "gemm/hopper/launch.cuh"

namespace qoq::w4a8 {

template <>
void run_experts_hopper<Weights::kChannel>(const ExpertParams& p, int tokens, int device,
                                           cudaStream_t stream) {
  run_experts_on_hopper<Weights::kChannel>(p, tokens, device, stream);
}

}  // namespace qoq::w4a8
