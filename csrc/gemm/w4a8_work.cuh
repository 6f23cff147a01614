// What one block of threads works on, and where its shared memory holds it.
#pragma once

#include "common/ptx.cuh"
#include "gemm/w4a8_config.h"

namespace qoq::w4a8 {

// A piece of a cluster's work: steps [begin, end) of one tile.
struct Work {
  int tile, begin, end;
};

// The pieces of one cluster, in the same order for the threads that load and those that multiply.
template <class Tile>
class WorkList {
 public:
  __device__ explicit WorkList(const Params& p) : p_(p), whole_(blockIdx.x / Tile::kCluster) {
    if (p.split > 0) {
      const int tile = whole_ / p.split, part = whole_ - tile * p.split;
      step_ = tile * p.steps + part * p.steps / p.split;
      step_end_ = tile * p.steps + (part + 1) * p.steps / p.split;
      whole_ = p.whole_tiles;
      return;
    }
    step_ = whole_ * p.piece;
    const int steps = (p.tiles_m * p.tiles_n - p.whole_tiles) * p.steps;
    step_end_ = min(step_ + p.piece, steps);
  }

  __device__ bool next(Work& work) {
    if (whole_ < p_.whole_tiles) {
      work = {whole_, 0, p_.steps};
      whole_ += gridDim.x / Tile::kCluster;
      return true;
    }
    if (step_ >= step_end_) return false;
    const int tile = step_ / p_.steps;
    const int begin = step_ - tile * p_.steps;
    const int end = min(p_.steps, begin + step_end_ - step_);
    work = {p_.whole_tiles + tile, begin, end};
    step_ += end - begin;
    return true;
  }

 private:
  const Params& p_;
  int whole_, step_, step_end_;
};

// What this block does of its cluster's work.
struct Steps {
  int begin, end;
};

template <class Tile>
__device__ inline Steps steps_of_block(const Work& work) {
  if constexpr (!Tile::kByInputs || Tile::kCluster == 1) return {work.begin, work.end};
  const int rank = ptx::cluster_rank(), length = work.end - work.begin;
  return {work.begin + rank * length / Tile::kCluster,
          work.begin + (rank + 1) * length / Tile::kCluster};
}

struct TilePosition {
  int m, n;  // in tiles
};

// Neighbouring tiles share weights, and no more than kBand x-tiles are in use at a time, so that
// both stay in the L2. Params::tiles_n counts clusters where blocks share tokens.
template <class Tile>
__device__ inline TilePosition position(int tile, const Params& p) {
  constexpr int kBand = 16;
  const int per_band = kBand * p.tiles_n;
  const int band = tile / per_band;
  const int in_band = tile - band * per_band;
  const int height = min(kBand, p.tiles_m - band * kBand);
  const int n = in_band / height;
  const int neighbour = blockIdx.x % Tile::kClusterTiles;
  return {band * kBand + in_band - n * height, n * Tile::kClusterTiles + neighbour};
}

// Tokens that one copy of x brings, for all blocks of the cluster or for one.
template <class Tile>
__device__ inline int tokens_of_copy(TilePosition at, const Params& p) {
  return at.m == p.tiles_m - 1 ? p.tail_tokens : Tile::kTokens / Tile::kClusterTiles;
}

// Addresses of one stage and its barriers.
template <class Tile, Weights kWeights>
struct SharedMemory {
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
  __device__ uint32_t output() const { return base + Tile::kStages * Tile::kXBytes; }
  __device__ uint32_t constants() const { return weight(Tile::kStages, 0); }
  __device__ uint32_t full(int stage) const {
    return constants() + Tile::kConstantBytes + 8 * stage;
  }
  __device__ uint32_t empty(int stage) const { return full(Tile::kStages + stage); }
  __device__ uint32_t flag() const { return full(2 * Tile::kStages); }
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
