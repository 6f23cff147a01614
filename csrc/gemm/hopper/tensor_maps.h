// What the copy engine is told of x and of the output.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include <algorithm>

#include "common/checks.h"
#include "gemm/w4a8_config.h"

namespace qoq::w4a8 {

// libcuda is there when a kernel runs, but not where the library is built.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    CHECK_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &result));
    STD_TORCH_CHECK(result == cudaDriverEntryPointSuccess && function != nullptr, "w4a8_gemm",
                    ": the NVIDIA driver has no cuTensorMapEncodeTiled; install one for CUDA 12");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encoder;
}

// Describes a tensor of kRank dimensions, the first without gaps, to the copy engine, which moves
// boxes of it in its 128-byte swizzle. What lies outside reads as zero and is not written.
template <int kRank>
CUtensorMap tensor_map(const void* base, CUtensorMapDataType type, const cuuint64_t (&sizes)[kRank],
                       const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank]) {
  CUtensorMap map;
  cuuint32_t element_strides[kRank];
  std::fill(element_strides, element_strides + kRank, 1);
  const CUresult result = tensor_map_encoder()(
      &map, type, kRank, const_cast<void*>(base), sizes, strides, box, element_strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "w4a8_gemm", ": cuTensorMapEncodeTiled returned ",
                  static_cast<int>(result));
  return map;
}

// The map of x, int8 [m, k], as [k_blocks][m][128].
inline CUtensorMap x_tensor_map(const Params& p, int tokens, int k_blocks) {
  const uint64_t k = uint64_t{kBlockK} * p.k_blocks;
  return tensor_map<3>(
      p.x, CU_TENSOR_MAP_DATA_TYPE_UINT8,
      {kBlockK, static_cast<cuuint64_t>(p.m), static_cast<cuuint64_t>(p.k_blocks)}, {k, kBlockK},
      {kBlockK, static_cast<cuuint32_t>(tokens), static_cast<cuuint32_t>(k_blocks)});
}

// The map of the output [m, n]; its 16 bits are copied as they are.
inline CUtensorMap out_tensor_map(const Params& p, int tokens) {
  return tensor_map<2>(p.out, CU_TENSOR_MAP_DATA_TYPE_UINT16,
                       {static_cast<cuuint64_t>(p.n), static_cast<cuuint64_t>(p.m)},
                       {static_cast<cuuint64_t>(p.n) * 2},
                       {kBlockN, static_cast<cuuint32_t>(tokens)});
}

}  // namespace qoq::w4a8
