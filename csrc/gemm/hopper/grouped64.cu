// The Hopper kernels for weights in groups of 64.
#include "gemm/hopper/launch.cuh"

namespace qoq::w4a8 {

template <>
void run_hopper<Weights::kG64>(const Params& p, int device, cudaStream_t stream) {
  run_plane_on_hopper<Weights::kG64>(p, device, stream);
}

}  // namespace qoq::w4a8
