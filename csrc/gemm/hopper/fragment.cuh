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
    at[1] = shared.weight(0, block) + kCodeBytes + thread / 4 * (4 * kKGroups<kWeights>);
    ptx::keep_in_registers(at);
  }
};

// A thread's part of a block in a stage. The weights lie there as kWeights and are multiplied as
// kUsed, since the first plane of a nested weight is a grouped one.
template <class Tile, Weights kWeights, Weights kUsed>
struct Fragment {
  static constexpr int kKGroups = w4a8::kKGroups<kWeights>;
  uint4 codes[2], residual[2];
  uint32_t params[kKGroups > 0 ? kKGroups : 1];

  __device__ void fetch(const FragmentAddress<Tile, kWeights>& first, int stage, int block) {
    constexpr int kBytes = kBlockBytes<kWeights> + kResidualBytes<kWeights>;
    const int offset = stage * Tile::template kWeightBytes<kWeights> + block * kBytes;
    const uint32_t from = first.at[0] + offset;
    if constexpr (kKGroups > 0)
      load_params(first.at[1] + offset, params);
    else
      params[0] = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = half * (kCodeBytes / 2);
      codes[half] = ptx::load_shared_16(from + at);
      if constexpr (kIsNested<kUsed>)
        residual[half] = ptx::load_shared_16(from + kBlockBytes<kWeights> + at);
    }
  }

  __device__ void unpack(int half, uint32_t (&a)[8]) const {
    const uint4 &c = codes[half], &r = residual[half];
    unpack_step<kUsed>({c.x, c.y}, {r.x, r.y}, params[2 * half * kKGroups / 4], a);
    unpack_step<kUsed>({c.z, c.w}, {r.z, r.w}, params[(2 * half + 1) * kKGroups / 4], a + 4);
  }
};

}  // namespace qoq::w4a8
