// A thread's codes and parameters in a stage, on the way to the registers that wgmma reads.
#pragma once

#include "common/ptx.cuh"
#include "common/wgmma.cuh"
#include "gemm/hopper/shared_memory.cuh"
#include "gemm/w4a8_unpack.cuh"

namespace qoq::w4a8 {

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
