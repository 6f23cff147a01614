// The Hopper kernels for nested weights in groups of 64.
#include "gemm/hopper/launch.cuh"

namespace qoq::w4a8 {

template <>
void run_hopper<Weights::kNestedG64>(const Params& p, int device, cudaStream_t stream) {
  run_nested_on_hopper<Weights::kNestedG64>(p, device, stream);
}

}  // namespace qoq::w4a8
