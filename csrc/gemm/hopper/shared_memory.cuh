// Where the shared memory of a block holds its stages, and how much a copy of x brings.
#pragma once

#include "common/ptx.cuh"
#include "gemm/hopper/tiles.h"
#include "gemm/w4a8_work.cuh"

namespace qoq::w4a8 {

// Tokens that one copy of x brings, for all blocks of the cluster or for one.
template <class Tile>
__device__ inline int tokens_of_copy(TilePosition at, const Params& p) {
  return at.m == p.tiles_m - 1 ? p.tail_tokens : Tile::kTokens / Tile::kClusterTiles;
}

// Addresses of one stage and its barriers.
template <class Tile, Weights kWeights>
struct SharedMemory {
  static constexpr int kStages = Tile::template kStages<kWeights>;

  uint32_t base;

  __device__ uint32_t x(int stage) const { return base + stage * Tile::kXBytes; }
  // The k_block that this thread's warpgroup multiplies.
  __device__ uint32_t x_of_group(int stage, int tokens_of_copy) const {
    return x(stage) + (Tile::kByInputs ? threadIdx.x / 128 * tokens_of_copy * kBlockK : 0);
  }
  __device__ uint32_t weight(int stage, int block) const {
    return output() + Tile::kOutputBytes + stage * Tile::template kWeightBytes<kWeights> +
           block * (kBlockBytes<kWeights> + kResidualBytes<kWeights>);
  }
  // The second plane of a block lies behind the first.
  __device__ uint32_t residual(int stage, int block) const {
    return weight(stage, block) + kBlockBytes<kWeights>;
  }
  __device__ uint32_t output() const { return base + kStages * Tile::kXBytes; }
  __device__ uint32_t constants() const { return weight(kStages, 0); }
  __device__ uint32_t full(int stage) const {
    return constants() + Tile::kConstantBytes + 8 * stage;
  }
  __device__ uint32_t empty(int stage) const { return full(kStages + stage); }
  __device__ uint32_t flag() const { return full(2 * kStages); }
};

template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace qoq::w4a8
