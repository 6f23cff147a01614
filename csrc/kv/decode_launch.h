// What the host code of the decode attention calls: the kernels are two files, which compile at the
// same time.
#pragma once

#include <cuda_runtime.h>

#include "common/checks.h"
#include "kv/decode_config.h"

namespace qoq::kv {

constexpr const char* kDecodeOp = "kv_decode";

struct DecodePages {
  int64_t head_size, k_bits, v_bits;
};

// For one new token of each sequence, and for several.
void launch_one(Params& p, const DecodePages& pages, const Tensor& workspace, int device,
                cudaStream_t stream);
void launch_many(Params& p, const DecodePages& pages, const Tensor& workspace, int device,
                 cudaStream_t stream);

}  // namespace qoq::kv
