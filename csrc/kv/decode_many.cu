// The decode attention for several new tokens of each sequence.
#include "kv/decode_launch.cuh"

namespace qoq::kv {

void launch_many(Params& p, const DecodePages& pages, const Tensor& workspace, int device,
                 cudaStream_t stream) {
  launch_kernel<true>(p, pages, workspace, device, stream);
}

}  // namespace qoq::kv
