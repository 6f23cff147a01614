// What one block of threads works on.
#pragma once

#include "common/ptx.cuh"
#include "gemm/w4a8_config.h"

namespace qoq::w4a8 {

// What there is to do, with what only the device knows filled in.
__device__ inline const Params& counted(const Params& p) { return p; }

// `tiles` and `tile_expert` were written before the kernel ahead of this one began, so that nothing
// has to be waited for.
__device__ inline ExpertParams counted(const ExpertParams& given) {
  ExpertParams p = given;
  p.tiles_m = ptx::load_l2(p.tiles);
  const int tiles = p.tiles_m * p.tiles_n;
  if (p.split == 0) {
    p.whole_tiles = tiles;
  } else if (static_cast<int>(blockIdx.x) / p.split >= tiles) {
    p.split = p.tiles_m = 0;  // no work for this block
  }
  return p;
}

// Whose weights a tile along m multiplies with.
__device__ inline int expert_of(const Params&, int) { return 0; }
__device__ inline int expert_of(const ExpertParams& p, int tile_m) {
  return ptx::load_l2(p.tile_expert + tile_m);
}

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

// Neighbouring tiles share weights, and no more than Tile::kBand x-tiles are in use at a time, so
// that both stay in the L2. Params::tiles_n counts clusters where blocks share tokens.
template <class Tile>
__device__ inline TilePosition position(int tile, const Params& p) {
  constexpr int kBand = Tile::kBand;
  const int per_band = kBand * p.tiles_n;
  const int band = tile / per_band;
  const int in_band = tile - band * per_band;
  const int height = min(kBand, p.tiles_m - band * kBand);
  const int n = in_band / height;
  const int neighbour = blockIdx.x % Tile::kClusterTiles;
  return {band * kBand + in_band - n * height, n * Tile::kClusterTiles + neighbour};
}

// Weights that only one tile reads leave the L2 first.
__device__ inline uint64_t weight_policy(const Params& p) {
  return p.tiles_m == 1 ? ptx::l2_policy_evict_first() : ptx::l2_policy_evict_normal();
}

// Whether a launch multiplies with both planes. The flag was written before the kernel ahead of
// this one began, so that nothing has to be waited for.
template <Weights kWeights>
__device__ inline bool uses_residual(const Params& p) {
  if constexpr (!kIsNested<kWeights>) return false;
  const volatile int32_t* flag = p.use_residual;
  return flag == nullptr || *flag != 0;
}

}  // namespace qoq::w4a8
