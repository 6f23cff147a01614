// out^T = W x^T on Hopper: the weights are the register operand of wgmma, tokens are its n.
//
//   global --bulk copy--> shared ring --16-byte loads--> registers --4 to 8 bits--> wgmma
//   x      --bulk tensor copy--> shared ring, 128-byte swizzle -------------------> wgmma
//
// One warp keeps the ring full, two warpgroups empty it. A thread finds the codes of its fragment
// in 16 bytes, and turns four codes at once into what wgmma reads, u8 = W8 + 128:
//   q group_scale + (group_offset + 128)
// as one 32-bit multiply-add of four bytes. Nothing carries: every byte stays in 0..255
// (`vllm_qoq.format`). The 128 leaves in the epilogue with the row sum of x.
//
// A tile whose k is split is summed as int32, so the order does not matter and the result is always
// the same: over the shared memory of a cluster while there are few tiles, in the L2 where the last
// round of many tiles leaves multiprocessors idle.
//
// The pipeline carries blocks of bytes that `unpack_half` alone understands: a second plane of
// 4-bit weights means longer blocks and one more 16-byte load there.
#pragma once

#include "common/ptx.cuh"
#include "w4a8_gemm_config.h"
#include "w4a8_gemm_epilogue.cuh"
#include "w4a8_gemm_work.cuh"

namespace qoq::w4a8 {

// ---- the loading warp ----------------------------------------------------------------

template <class Tile, bool kGrouped>
__device__ void load(const CUtensorMap& x_map, const Params& p,
                     const SharedMemory<Tile, kGrouped>& shared) {
  constexpr int kBytes = kBlockBytes<kGrouped>;
  const bool is_streamed = p.tiles_m == 1;
  const uint64_t policy =
      is_streamed ? ptx::l2_policy_evict_first() : ptx::l2_policy_evict_normal();

  auto load_weight = [&](int stage, int tile_n, int k) {
    ptx::mbarrier_arrive_expect_tx(shared.full(stage),
                                   Tile::kXBytes + Tile::template kWeightBytes<kGrouped>);
    const int first = min(tile_n * Tile::kBlocks, p.weight_blocks - 1);
    const uint8_t* source = p.weight + (static_cast<int64_t>(first) * p.k_blocks + k) * kBytes;
    uint32_t destination = shared.weight(stage, 0);
#pragma unroll 1
    for (int i = 0; i < Tile::kBlocks; ++i) {
      ptx::cp_async_bulk(destination, source, kBytes, shared.full(stage), policy);
      destination += kBytes;
      // Past the last channel: any block will do, nothing of it is written.
      if (first + i + 1 < p.weight_blocks) source += p.k_blocks * kBytes;
    }
  };

  // 1. Weights do not depend on the kernel before this one.
  {
    WorkList<Tile::kShare> list(p);
    Work work;
    int filled = 0;
    while (filled < Tile::kStages && list.next(work)) {
      const int n = position<Tile::kShare>(work.tile, p).n;
      for (int k = work.k_begin; k < work.k_end && filled < Tile::kStages; ++k)
        load_weight(filled++, n, k);
    }
  }
  ptx::griddepcontrol_wait();

  // 2. Everything else.
  WorkList<Tile::kShare> list(p);
  Work work;
  RingPosition<Tile::kStages> ring;
  int count = 0;
  while (list.next(work)) {
    const auto [m, n] = position<Tile::kShare>(work.tile, p);
    for (int k = work.k_begin; k < work.k_end; ++k, ++count) {
      if (count >= Tile::kStages) {
        ptx::mbarrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
        load_weight(ring.stage, n, k);
      }
      if constexpr (Tile::kShare == 1) {
        ptx::cp_async_bulk_tensor_2d(shared.x(ring.stage), &x_map, k * kBlockK, m * Tile::kTokens,
                                     shared.full(ring.stage));
      } else {
        constexpr int kPart = Tile::kTokens / Tile::kShare;
        const int part = blockIdx.x % Tile::kShare;
        const uint32_t first = ptx::cluster_rank() - part;
        ptx::cp_async_bulk_tensor_2d_multicast(
            shared.x(ring.stage) + part * kPart * kBlockK, &x_map, k * kBlockK,
            m * Tile::kTokens + part * kPart, shared.full(ring.stage),
            ((1 << Tile::kShare) - 1) << first);
      }
      ring.advance();
    }
  }
}

// ---- the multiplying warpgroups ------------------------------------------------------

// Codes of 64 inputs to the A registers of two k32 steps. In a word, the low nibbles are inputs
// 0..15 of the step, the high ones 16..31; words alternate between rows r and r + 8.
template <bool kGrouped>
__device__ inline void unpack_half(uint4 codes, uint32_t params, uint32_t (&a)[8]) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int step = 0; step < 2; ++step) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const uint32_t word = words[2 * step + row];
      uint32_t low = word & 0x0F0F0F0F;
      uint32_t high = (word >> 4) & 0x0F0F0F0F;
      if constexpr (kGrouped) {
        const uint32_t scale = row == 0 ? params & 0xFF : (params >> 16) & 0xFF;
        const uint32_t offset = __byte_perm(params, 0, row == 0 ? 0x1111 : 0x3333);
        low = low * scale + offset;
        high = high * scale + offset;
      }
      a[4 * step + row] = low;
      a[4 * step + row + 2] = high;
    }
  }
}

// What one thread multiplies of a stage.
template <class Tile, bool kGrouped>
struct Fragments {
  uint4 codes[Tile::kWeightBlocks][2];
  uint32_t params[Tile::kWeightBlocks];

  __device__ void fetch(const SharedMemory<Tile, kGrouped>& shared, int stage) {
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
#pragma unroll
    for (int b = 0; b < Tile::kWeightBlocks; ++b) {
      const uint32_t block = shared.weight(stage, group * Tile::kWeightBlocks + b);
      params[b] = kGrouped ? ptx::load_shared_4(block + kCodeBytes + thread / 4 * 4) : 0;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        codes[b][half] = ptx::load_shared_16(block + half * (kCodeBytes / 2) + thread * 16);
    }
  }
};

// The stage may be filled again, by all whose tokens it holds. Nothing for stage -1.
template <class Tile, bool kGrouped>
__device__ inline void release(const SharedMemory<Tile, kGrouped>& shared, int stage) {
  const int lane = threadIdx.x % 32;
  if constexpr (Tile::kShare == 1) {
    ptx::mbarrier_arrive_if(lane == 0 && stage >= 0, shared.empty(stage));
  } else {
    const uint32_t first = ptx::cluster_rank() / Tile::kShare * Tile::kShare;
    ptx::mbarrier_arrive_cluster_if(
        lane < Tile::kShare && stage >= 0,
        ptx::map_to_rank(shared.empty(max(stage, 0)), first + lane % Tile::kShare));
  }
}

template <class Tile, bool kGrouped>
__device__ void multiply(const Params& p, const SharedMemory<Tile, kGrouped>& shared,
                         char* shared_base) {
  const SharedConstants<Tile> constants(shared_base + (shared.constants() - shared.base));
  ptx::griddepcontrol_wait();  // for x_scale, the workspace and `out`

  WorkList<Tile::kShare> list(p);
  Work work;
  RingPosition<Tile::kStages> ring;
  while (list.next(work)) {
    const TilePosition at = position<Tile::kShare>(work.tile, p);
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
    Fragments<Tile, kGrouped> fragments;
    ptx::mbarrier_wait(shared.full(ring.stage), ring.parity);
    fragments.fetch(shared, ring.stage);
    int previous = -1, k = work.k_begin;
    while (true) {
      const uint64_t x = ptx::descriptor_k_major_128b(shared.x(ring.stage));
#pragma unroll
      for (int b = 0; b < Tile::kWeightBlocks; ++b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          ptx::wgmma_wait_group<1>();
          ptx::keep_in_registers(a[half]);
          if (b == 0 && half == 1) release(shared, previous);
          unpack_half<kGrouped>(fragments.codes[b][half], fragments.params[b], a[half]);
          ptx::keep_in_registers(a[half]);
          ptx::wgmma_fence();
#pragma unroll
          for (int step = 0; step < 2; ++step)
            ptx::WgmmaU8S8<Tile::kTokens>::issue(acc[b], &a[half][4 * step],
                                                 x + 2 * (2 * half + step));
          ptx::wgmma_commit_group();
        }
      }
      previous = ring.stage;
      ring.advance();
      if (++k == work.k_end) break;
      ptx::mbarrier_wait(shared.full(ring.stage), ring.parity);
      fragments.fetch(shared, ring.stage);
    }
    ptx::wgmma_wait_group<0>();
#pragma unroll
    for (int b = 0; b < Tile::kWeightBlocks; ++b) ptx::keep_in_registers(acc[b]);
    release(shared, previous);

    constants.store(fetched, threadIdx.x);
    if (p.split > 1) {
      add_up_cluster<Tile, kGrouped>(acc, p, at, shared, shared_base);
      return;
    }
    const bool is_whole = work.k_end - work.k_begin == p.k_blocks;
    if (is_whole) {
      ptx::named_barrier_sync(1, kConsumers);
    } else if (!add_to_shared_tile<Tile, kGrouped>(acc, p, work, shared, shared_base)) {
      continue;
    }
    write_output<Tile, kGrouped>(acc, p, at, shared, shared_base);
    ptx::named_barrier_sync(1, kConsumers);  // the constants may be overwritten
  }
}

template <class Tile, bool kGrouped>
__global__ void __launch_bounds__(kThreads, Tile::kResident)
    w4a8_gemm_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ Params p) {
  extern __shared__ char unaligned[];
  const uint32_t offset = -ptx::shared_address(unaligned) & 1023;
  char* shared_base = unaligned + offset;
  const SharedMemory<Tile, kGrouped> shared{ptx::shared_address(shared_base)};

  ptx::griddepcontrol_launch_dependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; ++i) {
      ptx::mbarrier_init(shared.full(i), 1);
      ptx::mbarrier_init(shared.empty(i), Tile::kShare * kConsumers / 32);
    }
    ptx::fence_mbarrier_init();
  }
  const bool is_cluster = Tile::kShare > 1 || p.split > 1;
  __syncwarp();
  if (Tile::kShare > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }

  if (threadIdx.x >= kConsumers) {
    ptx::setmaxnreg_decrease<Tile::kLoadRegisters>();
    if (threadIdx.x == kConsumers) {
      ptx::prefetch_tensormap(&x_map);
      load<Tile, kGrouped>(x_map, p, shared);
    }
  } else {
    ptx::setmaxnreg_increase<Tile::kMultiplyRegisters>();
    multiply<Tile, kGrouped>(p, shared, shared_base);
    // Others may still read what is in shared memory here, or arrive at its barriers.
    if (is_cluster) {
      __syncwarp();
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
  }
}

}  // namespace qoq::w4a8
