// The decode attention for one new token of each sequence.
#include "kv/decode_launch.cuh"

namespace qoq::kv {

void launch_one(Params& p, const DecodePages& pages, const Tensor& workspace, int device,
                cudaStream_t stream) {
  launch_kernel<false>(p, pages, workspace, device, stream);
}

}  // namespace qoq::kv
