// The Hopper kernels for weights per channel.
#include "gemm/hopper/launch.cuh"

namespace qoq::w4a8 {

template <>
void run_hopper<Weights::kChannel>(const Params& p, int device, cudaStream_t stream) {
  run_plane_on_hopper<Weights::kChannel>(p, device, stream);
}

}  // namespace qoq::w4a8
