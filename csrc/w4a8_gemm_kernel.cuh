// out^T = W x^T on Hopper: the weights are the register operand of wgmma, tokens are its n.
//
//   global --bulk copy--> shared ring --16-byte loads--> registers --4 to 8 bits--> wgmma
//   x      --bulk tensor copy--> shared ring, 128-byte swizzle -------------------> wgmma
//
// One warp keeps the ring full, two or four warpgroups empty it. A thread finds the codes of its
// fragment in 16 bytes, and turns four codes at once into what wgmma reads, u8 = W8 + 128:
//   q group_scale + (group_offset + 128)
// as one 32-bit multiply-add of four bytes. Nothing carries: every byte stays in 0..255
// (`vllm_qoq.format`). The 128 leaves in the epilogue with the row sum of x.
//
// Where k is divided, sums are added up as int32, so the order does not matter and the result is
// always the same: over shared memory among the warpgroups of a block and the blocks of a cluster,
// in the L2 among blocks that know nothing of each other.
//
// The pipeline carries blocks of bytes that `unpack_half` alone understands. A nested weight has a
// second plane of them, which it adds: W8 + 128 = q group_scale + (group_offset + 128 - 8) + plane,
// where four bytes at once are right as soon as the sums fit, whatever borrows in between.
#pragma once

#include "common/ptx.cuh"
#include "common/wgmma.cuh"
#include "w4a8_gemm_config.h"
#include "w4a8_gemm_epilogue.cuh"
#include "w4a8_gemm_work.cuh"

namespace qoq::w4a8 {

// ---- the loading warp ----------------------------------------------------------------

template <class Tile, Weights kWeights>
__device__ void load(const CUtensorMap& x_map, const CUtensorMap& x_tail_map, const Params& p,
                     const SharedMemory<Tile, kWeights>& shared) {
  constexpr int kBytes = kBlockBytes<kWeights>;
  const bool is_streamed = p.tiles_m == 1;
  const uint64_t policy =
      is_streamed ? ptx::l2_policy_evict_first() : ptx::l2_policy_evict_normal();

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
      const int first = min(at.n * Tile::kBlocks, p.weight_blocks - 1);
      const uint8_t* source = p.weight + (static_cast<int64_t>(first) * p.k_blocks + step) * kBytes;
      uint32_t destination = shared.weight(stage, 0);
#pragma unroll 1
      for (int i = 0; i < Tile::kBlocks; ++i) {
        ptx::cp_async_bulk(destination, source, kBytes, shared.full(stage), policy);
        destination += kBytes;
        // Past the last channel: any block will do, nothing of it is written.
        if (first + i + 1 < p.weight_blocks) source += p.k_blocks * kBytes;
      }
      if constexpr (kWeights == Weights::kNested) {
        source = p.residual + (static_cast<int64_t>(first) * p.k_blocks + step) * kCodeBytes;
        destination = shared.residual(stage, 0);
#pragma unroll 1
        for (int i = 0; i < Tile::kBlocks; ++i) {
          ptx::cp_async_bulk(destination, source, kCodeBytes, shared.full(stage), policy);
          destination += kCodeBytes;
          if (first + i + 1 < p.weight_blocks) source += p.k_blocks * kCodeBytes;
        }
      }
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
      const int k_block = step * Tile::kStepBlocks;
      if constexpr (Tile::kClusterTiles == 1) {
        ptx::cp_async_bulk_tensor_3d(shared.x(ring.stage), map, 0, at.m * Tile::kTokens, k_block,
                                     shared.full(ring.stage));
      } else {
        const int first = ptx::cluster_rank() * tokens;
        ptx::cp_async_bulk_tensor_3d_multicast(shared.x(ring.stage) + first * kBlockK, map, 0,
                                               at.m * Tile::kTokens + first, k_block,
                                               shared.full(ring.stage), (1 << Tile::kCluster) - 1);
      }
      ring.advance();
    }
  }
}

// ---- the multiplying warpgroups ------------------------------------------------------

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

// What one thread multiplies of a stage.
template <class Tile, Weights kWeights>
struct Fragments {
  uint4 codes[Tile::kWeightBlocks][2], residual[Tile::kWeightBlocks][2];
  uint32_t params[Tile::kWeightBlocks];

  __device__ void fetch(const SharedMemory<Tile, kWeights>& shared, int stage) {
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
#pragma unroll
    for (int b = 0; b < Tile::kWeightBlocks; ++b) {
      const int i = group * Tile::kWeightBlocks + b;
      const uint32_t block = shared.weight(stage, i);
      params[b] =
          kHasGroups<kWeights> ? ptx::load_shared_4(block + kCodeBytes + thread / 4 * 4) : 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = half * (kCodeBytes / 2) + thread * 16;
        codes[b][half] = ptx::load_shared_16(block + at);
        if constexpr (kWeights == Weights::kNested)
          residual[b][half] = ptx::load_shared_16(shared.residual(stage, i) + at);
      }
    }
  }
};

// The stage may be filled again, by all whose tokens it holds. Nothing for stage -1.
template <class Tile, Weights kWeights>
__device__ inline void release(const SharedMemory<Tile, kWeights>& shared, int stage) {
  const int lane = threadIdx.x % 32;
  __syncwarp();  // one lane speaks for all
  if constexpr (Tile::kClusterTiles == 1) {
    ptx::mbarrier_arrive_if(lane == 0 && stage >= 0, shared.empty(stage));
  } else {
    ptx::mbarrier_arrive_cluster_if(
        lane < Tile::kCluster && stage >= 0,
        ptx::map_to_rank(shared.empty(max(stage, 0)), lane % Tile::kCluster));
  }
}

template <class Tile, Weights kWeights>
__device__ void multiply(const CUtensorMap& out_map, const Params& p,
                         const SharedMemory<Tile, kWeights>& shared, char* shared_base) {
  const SharedConstants<Tile> constants(shared_base + (shared.constants() - shared.base));
  ptx::griddepcontrol_wait();  // for x_scale, the workspace and `out`

  WorkList<Tile> list(p);
  Work work;
  RingPosition<Tile::kStages> ring;
  while (list.next(work)) {
    const TilePosition at = position<Tile>(work.tile, p);
    const int copy_tokens = tokens_of_copy<Tile>(at, p);
    Constants<Tile> fetched;
    fetched.fetch(p, at.m * Tile::kTokens, at.n * Tile::kChannels, threadIdx.x);

    Accumulators<Tile> acc;
#pragma unroll
    for (int b = 0; b < Tile::kWeightBlocks; ++b)
#pragma unroll
      for (int i = 0; i < Tile::kAccumulators; ++i) acc[b][i] = 0;

    // Two sets of A registers: one is filled while the wgmmas of the other run. The codes of a
    // stage are fetched while the wgmmas of the one before it run.
    uint32_t a[2][8];
#pragma unroll
    for (int i = 0; i < 8; ++i) a[0][i] = a[1][i] = 0;
    Fragments<Tile, kWeights> fragments;
    int previous = -1;
    auto [step, end] = steps_of_block<Tile>(work);
    if (step < end) {
      ptx::mbarrier_wait(shared.full(ring.stage), ring.parity);
      fragments.fetch(shared, ring.stage);
    }
    while (step < end) {
      const uint64_t x = ptx::descriptor_k_major_128b(shared.x_of_group(ring.stage, copy_tokens));
#pragma unroll
      for (int b = 0; b < Tile::kWeightBlocks; ++b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          ptx::wgmma_wait_group<1>();
          ptx::keep_in_registers(a[half]);
          if (b == 0 && half == 1) release(shared, previous);
          unpack_half<kWeights>(fragments.codes[b][half], fragments.residual[b][half],
                                fragments.params[b], a[half]);
          ptx::keep_in_registers(a[half]);
          ptx::wgmma_fence();
#pragma unroll
          for (int part = 0; part < 2; ++part)
            ptx::WgmmaU8S8<Tile::kTokens>::issue(acc[b], &a[half][4 * part],
                                                 x + 2 * (2 * half + part));
          ptx::wgmma_commit_group();
        }
      }
      previous = ring.stage;
      ring.advance();
      if (++step == end) break;
      ptx::mbarrier_wait(shared.full(ring.stage), ring.parity);
      fragments.fetch(shared, ring.stage);
    }
    ptx::wgmma_wait_group<0>();
#pragma unroll
    for (int b = 0; b < Tile::kWeightBlocks; ++b) ptx::keep_in_registers(acc[b]);
    release(shared, previous);

    constants.store(fetched, threadIdx.x);
    OutAccumulators<Tile> sums;
    add_up_groups<Tile, kWeights>(acc, sums, shared);
    const bool is_whole = work.end - work.begin == p.steps;
    if (is_whole) {
      ptx::named_barrier_sync(1, Tile::kConsumers);
    } else if (!add_to_shared_tile<Tile, kWeights>(sums, p, work, shared, shared_base)) {
      continue;
    }
    write_output<Tile, kWeights>(sums, out_map, p, at, shared, shared_base);
    ptx::named_barrier_sync(1, Tile::kConsumers);  // the constants may be overwritten
  }
  ptx::cp_async_bulk_wait_group_read<0>();
}

template <class Tile, Weights kWeights>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    w4a8_gemm_kernel(const __grid_constant__ CUtensorMap x_map,
                     const __grid_constant__ CUtensorMap x_tail_map,
                     const __grid_constant__ CUtensorMap out_map,
                     const __grid_constant__ Params p) {
  static_assert(Tile::template kFits<kWeights>);
  static_assert(!Tile::kByInputs || kWeights != Weights::kNested);
  extern __shared__ char unaligned[];
  const uint32_t offset = -ptx::shared_address(unaligned) & 1023;
  char* shared_base = unaligned + offset;
  const SharedMemory<Tile, kWeights> shared{ptx::shared_address(shared_base)};

  ptx::griddepcontrol_launch_dependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; ++i) {
      ptx::mbarrier_init(shared.full(i), 1);
      ptx::mbarrier_init(shared.empty(i), Tile::kClusterTiles * Tile::kConsumers / 32);
    }
    ptx::fence_mbarrier_init();
  }
  __syncwarp();
  if (Tile::kCluster > 1) {
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }

  if (threadIdx.x >= Tile::kConsumers) {
    ptx::setmaxnreg_decrease<Tile::kLoadRegisters>();
    if (threadIdx.x == Tile::kConsumers) {
      ptx::prefetch_tensormap(p.tiles_m == 1 ? &x_tail_map : &x_map);
      load<Tile, kWeights>(x_map, x_tail_map, p, shared);
    }
  } else {
    ptx::setmaxnreg_increase<Tile::kMultiplyRegisters>();
    multiply<Tile, kWeights>(out_map, p, shared, shared_base);
    // Others may still read what is in shared memory here, or arrive at its barriers.
    if (Tile::kCluster > 1) {
      __syncwarp();
      ptx::cluster_arrive_relaxed();
      ptx::cluster_wait();
    }
  }
}

}  // namespace qoq::w4a8
