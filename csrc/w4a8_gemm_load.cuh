// The loading warps: from global memory into the rings.
#pragma once

#include "common/ptx.cuh"
#include "w4a8_gemm_config.h"
#include "w4a8_gemm_work.cuh"

namespace qoq::w4a8 {

// Weights that one tile reads leave the L2 first.
__device__ inline uint64_t weight_policy(const Params& p) {
  return p.tiles_m == 1 ? ptx::l2_policy_evict_first() : ptx::l2_policy_evict_normal();
}

// The weights of one step of a tile, one copy a block of 64 channels and plane.
template <class Tile, Weights kWeights>
__device__ inline void copy_weights(const Params& p, const SharedMemory<Tile, kWeights>& shared,
                                    int stage, uint32_t barrier, TilePosition at, int step,
                                    uint64_t policy) {
  const int first = min(at.n * Tile::kBlocks, p.weight_blocks - 1);
  auto copy_plane = [&](const uint8_t* plane, int bytes, uint32_t destination) {
    const uint8_t* source = plane + (static_cast<int64_t>(first) * p.k_blocks + step) * bytes;
#pragma unroll 1
    for (int i = 0; i < Tile::kBlocks; ++i) {
      ptx::cp_async_bulk(destination, source, bytes, barrier, policy);
      destination += bytes;
      // Past the last channel: any block will do, nothing of it is written.
      if (first + i + 1 < p.weight_blocks) source += p.k_blocks * bytes;
    }
  };
  copy_plane(p.weight, kBlockBytes<kWeights>, shared.weight(stage, 0));
  if constexpr (kWeights == Weights::kNested)
    copy_plane(p.residual, kCodeBytes, shared.residual(stage, 0));
}

// The inputs of one step of a tile; where a cluster shares them, this block's part for all.
template <class Tile, Weights kWeights>
__device__ inline void copy_x(const CUtensorMap* map, const SharedMemory<Tile, kWeights>& shared,
                              int stage, TilePosition at, int tokens, int step) {
  const int k_block = step * Tile::kStepBlocks;
  if constexpr (Tile::kClusterTiles == 1) {
    ptx::cp_async_bulk_tensor_3d(shared.x(stage), map, 0, at.m * Tile::kTokens, k_block,
                                 shared.full(stage));
  } else {
    const int first = ptx::cluster_rank() * tokens;
    ptx::cp_async_bulk_tensor_3d_multicast(shared.x(stage) + first * kBlockK, map, 0,
                                           at.m * Tile::kTokens + first, k_block,
                                           shared.full(stage), (1 << Tile::kCluster) - 1);
  }
}

// One thread fills the ring.
template <class Tile, Weights kWeights>
__device__ void load(const CUtensorMap& x_map, const CUtensorMap& x_tail_map, const Params& p,
                     const SharedMemory<Tile, kWeights>& shared) {
  constexpr int kBytes = kBlockBytes<kWeights>;
  const uint64_t policy = weight_policy(p);

  auto load_weight = [&](int stage, TilePosition at, int step) {
    const int x_bytes =
        Tile::kStepBlocks * Tile::kClusterTiles * tokens_of_copy<Tile>(at, p) * kBlockK;
    if constexpr (Tile::kByInputs) {
      // Neighbours in memory. Past the last k_block x is zero, so that any weight will do.
      const int k = step * Tile::kStepBlocks;
      const int bytes = min(Tile::kStepBlocks, p.k_blocks - k) * kBytes;
      ptx::mbarrier_arrive_expect_tx(shared.full(stage), x_bytes + bytes);
      ptx::cp_async_bulk(shared.weight(stage, 0),
                         p.weight + (static_cast<int64_t>(at.n) * p.k_blocks + k) * kBytes, bytes,
                         shared.full(stage), policy);
    } else {
      ptx::mbarrier_arrive_expect_tx(shared.full(stage),
                                     x_bytes + Tile::template kWeightBytes<kWeights>);
      copy_weights<Tile, kWeights>(p, shared, stage, shared.full(stage), at, step, policy);
    }
  };

  // 1. Weights do not depend on the kernel before this one.
  {
    WorkList<Tile> list(p);
    Work work;
    int filled = 0;
    while (filled < Tile::kStages && list.next(work)) {
      const TilePosition at = position<Tile>(work.tile, p);
      const auto [begin, end] = steps_of_block<Tile>(work);
      for (int step = begin; step < end && filled < Tile::kStages; ++step)
        load_weight(filled++, at, step);
    }
  }
  ptx::griddepcontrol_wait();

  // 2. Everything else.
  WorkList<Tile> list(p);
  Work work;
  RingPosition<Tile::kStages> ring;
  int count = 0;
  while (list.next(work)) {
    const TilePosition at = position<Tile>(work.tile, p);
    const int tokens = tokens_of_copy<Tile>(at, p);
    const CUtensorMap* map = at.m == p.tiles_m - 1 ? &x_tail_map : &x_map;
    const auto [begin, end] = steps_of_block<Tile>(work);
    for (int step = begin; step < end; ++step, ++count) {
      if (count >= Tile::kStages) {
        ptx::mbarrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
        load_weight(ring.stage, at, step);
      }
      copy_x<Tile, kWeights>(map, shared, ring.stage, at, tokens, step);
      ring.advance();
    }
  }
}

// The same by two threads, where x and the weights have rings of their own. One brings weights,
// which do not depend on the kernel before this one,
template <class Tile, Weights kWeights>
__device__ void load_weights(const Params& p, const SharedMemory<Tile, kWeights>& shared) {
  const uint64_t policy = weight_policy(p);
  WorkList<Tile> list(p);
  Work work;
  RingPosition<Tile::kPackedStages> ring;
  while (list.next(work)) {
    const TilePosition at = position<Tile>(work.tile, p);
    for (int step = work.begin; step < work.end; ++step) {
      const uint32_t full = shared.packed_full(ring.stage);
      ptx::mbarrier_wait(shared.packed_empty(ring.stage), ring.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, Tile::template kWeightBytes<kWeights>);
      copy_weights<Tile, kWeights>(p, shared, ring.stage, full, at, step, policy);
      ring.advance();
    }
  }
}

// and one x.
template <class Tile, Weights kWeights>
__device__ void load_x(const CUtensorMap& x_map, const CUtensorMap& x_tail_map, const Params& p,
                       const SharedMemory<Tile, kWeights>& shared) {
  ptx::griddepcontrol_wait();
  WorkList<Tile> list(p);
  Work work;
  RingPosition<Tile::kStages> ring;
  while (list.next(work)) {
    const TilePosition at = position<Tile>(work.tile, p);
    const int tokens = tokens_of_copy<Tile>(at, p);
    const CUtensorMap* map = at.m == p.tiles_m - 1 ? &x_tail_map : &x_map;
    for (int step = work.begin; step < work.end; ++step) {
      ptx::mbarrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(shared.full(ring.stage),
                                     Tile::kClusterTiles * tokens * kBlockK);
      copy_x<Tile, kWeights>(map, shared, ring.stage, at, tokens, step);
      ring.advance();
    }
  }
}

}  // namespace qoq::w4a8
