// The Hopper kernels for weights with groups.
#include "gemm/hopper/launch.cuh"

namespace qoq::w4a8 {

template <>
void run_hopper<Weights::kGrouped>(const Params& p, int device, cudaStream_t stream) {
  run_plane_on_hopper<Weights::kGrouped>(p, device, stream);
}

}  // namespace qoq::w4a8
