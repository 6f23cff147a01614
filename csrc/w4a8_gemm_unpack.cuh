// From packed weights to what wgmma reads.
#pragma once

#include "common/ptx.cuh"
#include "w4a8_gemm_config.h"
#include "w4a8_gemm_work.cuh"

namespace qoq::w4a8 {

// Codes of 64 inputs to the A registers of two k32 steps. In a word, the low nibbles are inputs
// 0..15 of the step, the high ones 16..31; words alternate between rows r and r + 8.
template <Weights kWeights>
__device__ inline void unpack_half(uint4 codes, uint4 residual, uint32_t params, uint32_t (&a)[8]) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  const uint32_t more[4] = {residual.x, residual.y, residual.z, residual.w};
#pragma unroll
  for (int step = 0; step < 2; ++step) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int i = 2 * step + row;
      uint32_t low = words[i] & 0x0F0F0F0F;
      uint32_t high = (words[i] >> 4) & 0x0F0F0F0F;
      if constexpr (kHasGroups<kWeights>) {
        const uint32_t scale = row == 0 ? params & 0xFF : (params >> 16) & 0xFF;
        uint32_t low_offset = __byte_perm(params, 0, row == 0 ? 0x1111 : 0x3333);
        uint32_t high_offset = low_offset;
        if constexpr (kWeights == Weights::kNested) {
          low_offset += (more[i] & 0x0F0F0F0F) - 0x01010101u * kResidualZero;
          high_offset += ((more[i] >> 4) & 0x0F0F0F0F) - 0x01010101u * kResidualZero;
        }
        low = low * scale + low_offset;
        high = high * scale + high_offset;
      }
      a[4 * step + row] = low;
      a[4 * step + row + 2] = high;
    }
  }
}

// What one thread of a warpgroup has of a block of 64 channels.
template <class Tile, Weights kWeights>
struct Fragment {
  uint4 codes[2], residual[2];
  uint32_t params;

  __device__ void fetch(const SharedMemory<Tile, kWeights>& shared, int stage, int block) {
    const int thread = threadIdx.x % 128;
    const uint32_t from = shared.weight(stage, block);
    params = kHasGroups<kWeights> ? ptx::load_shared_4(from + kCodeBytes + thread / 4 * 4) : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = half * (kCodeBytes / 2) + thread * 16;
      codes[half] = ptx::load_shared_16(from + at);
      if constexpr (kWeights == Weights::kNested)
        residual[half] = ptx::load_shared_16(shared.residual(stage, block) + at);
    }
  }

  __device__ void unpack(int half, uint32_t (&a)[8]) const {
    unpack_half<kWeights>(codes[half], residual[half], params, a);
  }
};

}  // namespace qoq::w4a8
