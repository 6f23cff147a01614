// The loading warps: from global memory into the rings.
#pragma once

#include "common/ptx.cuh"
#include "gemm/hopper/shared_memory.cuh"
#include "gemm/hopper/tiles.h"

namespace qoq::w4a8 {

// Loads x of every step, by one thread; where a cluster shares x, this block's part for all.
template <class Tile, Weights kWeights>
__device__ void load_x(const CUtensorMap& x_map, const CUtensorMap& x_tail_map, const Params& p,
                       const SharedMemory<Tile, kWeights>& shared) {
  ptx::prefetch_tensormap(p.tiles_m == 1 ? &x_tail_map : &x_map);
  ptx::griddepcontrol_wait();
  WorkList<Tile> list(p);
  Work work;
  RingPosition<Tile::template kStages<kWeights>> ring;
  while (list.next(work)) {
    const TilePosition at = position<Tile>(work.tile, p);
    const int tokens = tokens_of_copy<Tile>(at, p);
    const int first = Tile::kClusterTiles == 1 ? 0 : ptx::cluster_rank() * tokens;
    const int bytes = Tile::kStepBlocks * Tile::kClusterTiles * tokens * kBlockK;
    const CUtensorMap* map = at.m == p.tiles_m - 1 ? &x_tail_map : &x_map;
    const auto [begin, end] = steps_of_block<Tile>(work);
    for (int step = begin; step < end; ++step) {
      const uint32_t full = shared.full(ring.stage);
      ptx::mbarrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, bytes);
      if constexpr (Tile::kClusterTiles == 1) {
        ptx::cp_async_bulk_tensor_3d(shared.x(ring.stage), map, 0, at.m * Tile::kTokens,
                                     step * Tile::kStepBlocks, full);
      } else {
        ptx::cp_async_bulk_tensor_3d_multicast(
            shared.x(ring.stage) + first * kBlockK, map, 0, at.m * Tile::kTokens + first,
            step * Tile::kStepBlocks, full, (1 << Tile::kCluster) - 1);
      }
      ring.advance();
    }
  }
}

// Loads the weights of every step, by Tile::kWeightLoaders threads, which divide the blocks of a
// step among them. Weights do not depend on the kernel before this one.
template <class Tile, Weights kWeights, class Problem>
__device__ void load_weights(const Problem& p, const SharedMemory<Tile, kWeights>& shared,
                             int loader) {
  constexpr int kCount = Tile::kByInputs ? 1 : Tile::kBlocks / Tile::kWeightLoaders;
  constexpr int kBytes = kBlockBytes<kWeights>;
  const uint64_t policy = weight_policy(p);
  const bool has_residual = uses_residual<kWeights>(p);
  const int block_bytes = kBytes + (has_residual ? kResidualBytes<kWeights> : 0);
  WorkList<Tile> list(p);
  Work work;
  RingPosition<Tile::template kStages<kWeights>> ring;
  while (list.next(work)) {
    const auto [tile_m, tile_n] = position<Tile>(work.tile, p);
    const int expert_blocks = expert_of(p, tile_m) * p.weight_blocks;
    const auto [begin, end] = steps_of_block<Tile>(work);
    const uint8_t *weight[kCount], *residual[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int block = Tile::kByInputs ? tile_n : tile_n * Tile::kBlocks + loader * kCount + i;
      // Past the last channel any block will do, since nothing of it is written.
      const int64_t first = int64_t{expert_blocks + min(block, p.weight_blocks - 1)} * p.k_blocks +
                            begin * Tile::kStepBlocks;
      weight[i] = p.weight + first * kBytes;
      residual[i] = p.residual + first * kCodeBytes;
    }
    for (int step = begin; step < end; ++step) {
      const uint32_t full = shared.full(ring.stage);
      // By inputs, the k_blocks of a step are neighbours in memory. Past the last one x is zero, so
      // any weight will do.
      const int k_blocks =
          Tile::kByInputs ? min(Tile::kStepBlocks, p.k_blocks - step * Tile::kStepBlocks) : 1;
      ptx::mbarrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, kCount * k_blocks * block_bytes);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int block = loader * kCount + i;
        ptx::cp_async_bulk(shared.weight(ring.stage, block), weight[i], k_blocks * kBytes, full,
                           policy);
        weight[i] += Tile::kStepBlocks * kBytes;
        if (has_residual) {
          ptx::cp_async_bulk(shared.residual(ring.stage, block), residual[i], kCodeBytes, full,
                             policy);
          residual[i] += kCodeBytes;
        }
      }
      ring.advance();
    }
  }
}

}  // namespace qoq::w4a8
