// The Hopper kernels for weights in groups of 32.
#include "gemm/hopper/launch.cuh"

namespace qoq::w4a8 {

template <>
void run_hopper<Weights::kG32>(const Params& p, int device, cudaStream_t stream) {
  run_plane_on_hopper<Weights::kG32>(p, device, stream);
}

}  // namespace qoq::w4a8
