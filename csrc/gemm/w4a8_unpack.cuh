// From packed weights to what wgmma reads.
#pragma once

#include "common/ptx.cuh"
#include "common/wgmma.cuh"
#include "gemm/w4a8_config.h"
#include "gemm/w4a8_work.cuh"

namespace qoq::w4a8 {

// Turns the codes of 64 inputs into the A registers of two k32 steps. In a word, the low nibbles
// are inputs 0..15 of the step and the high ones 16..31; words alternate between rows r and r + 8.
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
      const uint32_t scale = row == 0 ? params & 0xFF : (params >> 16) & 0xFF;
      const uint32_t offset = __byte_perm(params, 0, row == 0 ? 0x1111 : 0x3333);
      if constexpr (kWeights == Weights::kGrouped) {
        low = low * scale + offset;
        high = high * scale + offset;
      } else if constexpr (kWeights == Weights::kNested) {
        const uint32_t zero = offset - 0x01010101u * kResidualZero;
        high = high * scale + (((more[i] >> 4) & 0x0F0F0F0F) + zero);
        // A byte of both planes is 16 high + low, so the low one needs no mask of its own.
        low = words[i] * scale + (more[i] + 17 * zero) - 16 * high;
      }
      a[4 * step + row] = low;
      a[4 * step + row + 2] = high;
    }
  }
}

// Where a thread of a warpgroup finds its codes and parameters of a block of 64 channels, in the
// first stage. It is held in registers, or it would be reckoned anew for every stage.
template <class Tile, Weights kWeights>
struct FragmentAddress {
  uint32_t at[2];

  __device__ FragmentAddress(const SharedMemory<Tile, kWeights>& shared, int block) {
    const int thread = threadIdx.x % 128;
    at[0] = shared.weight(0, block) + thread * 16;
    at[1] = shared.weight(0, block) + kCodeBytes + thread / 4 * 4;
    ptx::keep_in_registers(at);
  }
};

// A thread's part of a block in a stage. The weights lie there as kWeights and are multiplied as
// kUsed, since the first plane of a nested weight is a grouped one.
template <class Tile, Weights kWeights, Weights kUsed>
struct Fragment {
  uint4 codes[2], residual[2];
  uint32_t params;

  __device__ void fetch(const FragmentAddress<Tile, kWeights>& first, int stage, int block) {
    constexpr int kBytes = kBlockBytes<kWeights> + kResidualBytes<kWeights>;
    const int offset = stage * Tile::template kWeightBytes<kWeights> + block * kBytes;
    const uint32_t from = first.at[0] + offset;
    params = kHasGroups<kWeights> ? ptx::load_shared_4(first.at[1] + offset) : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = half * (kCodeBytes / 2);
      codes[half] = ptx::load_shared_16(from + at);
      if constexpr (kUsed == Weights::kNested)
        residual[half] = ptx::load_shared_16(from + kBlockBytes<kWeights> + at);
    }
  }

  __device__ void unpack(int half, uint32_t (&a)[8]) const {
    unpack_half<kUsed>(codes[half], residual[half], params, a);
  }
};

}  // namespace qoq::w4a8
