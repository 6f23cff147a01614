// The Hopper kernels for nested weights.
#include "gemm/hopper/launch.cuh"

namespace qoq::w4a8 {

template <>
void run_hopper<Weights::kNested>(const Params& p, int device, cudaStream_t stream) {
  if (p.m <= 16) {
    launch_fastest_on_hopper<Weights::kNested, Nested16>(p, device, stream);
  } else if (p.m <= 64) {
    launch_fastest_on_hopper<Weights::kNested, Nested64>(p, device, stream);
  } else if (p.m <= 128) {
    launch_fastest_on_hopper<Weights::kNested, Nested128>(p, device, stream);
  } else {
    launch_fastest_on_hopper<Weights::kNested, Nested128, Nested192, Nested256>(p, device, stream);
  }
}

}  // namespace qoq::w4a8
