// out^T = W x^T on Hopper: the weights are the register operand of wgmma, tokens are its n.
//
//   weights  --bulk copy--> shared ring --16-byte loads--> registers --4 to 8 bits--> wgmma
//   x        --bulk tensor copy--> shared ring, 128-byte swizzle -------------------> wgmma
//
// Two to four warps keep the ring full, two to four warpgroups empty it. A thread finds the codes
// of its fragment in 16 bytes, and turns four codes at once into what wgmma reads, u8 = W8 + 128:
//   q group_scale + (group_offset + 128)
// as one 32-bit multiply-add of four bytes. Nothing carries, because every byte stays in 0..255
// (`vllm_qoq.checkpoint.format`). The epilogue takes the 128 back with the row sum of x.
//
// Where k is divided, sums are added up as int32, so the order does not matter and the result is
// always the same: over shared memory among the warpgroups of a block and the blocks of a cluster,
// in the L2 among blocks that know nothing of each other.
//
// The pipeline carries blocks of bytes that `Fragment` alone understands. A nested weight has a
// second plane of them, which it adds: W8 + 128 = q group_scale + (group_offset + 128 - 8) + plane,
// where four bytes at once are right as soon as the sums fit, whatever borrows in between.
#pragma once

#include "common/ptx.cuh"
#include "common/wgmma.cuh"
#include "gemm/hopper/epilogue.cuh"
#include "gemm/hopper/fragment.cuh"
#include "gemm/hopper/load.cuh"
#include "gemm/hopper/shared_memory.cuh"
#include "gemm/hopper/tiles.h"

namespace qoq::w4a8 {

// Tells the blocks whose copies fill a stage that it may be filled again.
template <class Tile, Weights kWeights>
class Release {
 public:
  __device__ explicit Release(const SharedMemory<Tile, kWeights>& shared) {
    const int lane = threadIdx.x % 32;
    empty_[0] = shared.empty(0);
    if constexpr (Tile::kClusterTiles > 1)
      empty_[0] = ptx::map_to_rank(empty_[0], lane % Tile::kClusterTiles);
    ptx::keep_in_registers(empty_);
  }

  // Does nothing for stage -1.
  __device__ void operator()(int stage) const {
    __syncwarp();  // one lane speaks for all
    const bool is_speaking = threadIdx.x % 32 < Tile::kClusterTiles && stage >= 0;
    const uint32_t barrier = empty_[0] + 8 * stage;
    if constexpr (Tile::kClusterTiles == 1) {
      ptx::mbarrier_arrive_if(is_speaking, barrier);
    } else {
      ptx::mbarrier_arrive_cluster_if(is_speaking, barrier);
    }
  }

 private:
  uint32_t empty_[1];
};

// Multiplies and adds up this block's steps of a tile.
template <class Tile, Weights kWeights, Weights kUsed>
class MainLoop {
 public:
  __device__ explicit MainLoop(const SharedMemory<Tile, kWeights>& shared)
      : shared_(shared), release_(shared) {}

  __device__ void run(Accumulators<Tile>& acc, Steps steps, int copy_tokens) {
    const FragmentAddress<Tile, kWeights> address(shared_, threadIdx.x / 128 * Tile::kWeightBlocks);
    const uint64_t first_x = ptx::descriptor_k_major_128b(shared_.x_of_group(0, copy_tokens));
    // Two sets of A registers: one is filled while the wgmmas of the other run. The codes of a
    // stage are fetched while the wgmmas of the one before it run.
    uint32_t a[2][8];
#pragma unroll
    for (int i = 0; i < 8; ++i) a[0][i] = a[1][i] = 0;
    Fragment<Tile, kWeights, kUsed> fragments[Tile::kWeightBlocks];
    auto fetch = [&] {
      ptx::mbarrier_wait(shared_.full(ring_.stage), ring_.parity);
#pragma unroll
      for (int b = 0; b < Tile::kWeightBlocks; ++b) fragments[b].fetch(address, ring_.stage, b);
    };
    int previous = -1;
    auto [step, end] = steps;
    if (step < end) fetch();
    while (step < end) {
      const uint64_t x = ptx::move_descriptor(first_x, ring_.stage * Tile::kXBytes);
#pragma unroll
      for (int b = 0; b < Tile::kWeightBlocks; ++b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          ptx::wgmma_wait_group<1>();
          ptx::keep_in_registers(a[half]);
          if (b == 0 && half == 1) release_(previous);
          fragments[b].unpack(half, a[half]);
          ptx::keep_in_registers(a[half]);
          ptx::wgmma_fence();
#pragma unroll
          for (int part = 0; part < 2; ++part)
            ptx::WgmmaU8S8<Tile::kTokens>::issue(acc[b], &a[half][4 * part],
                                                 ptx::move_descriptor(x, 32 * (2 * half + part)));
          ptx::wgmma_commit_group();
        }
      }
      previous = ring_.stage;
      ring_.advance();
      if (++step == end) break;
      fetch();
    }
    ptx::wgmma_wait_group<0>();
#pragma unroll
    for (int b = 0; b < Tile::kWeightBlocks; ++b) ptx::keep_in_registers(acc[b]);
    release_(previous);
  }

 private:
  const SharedMemory<Tile, kWeights>& shared_;
  const Release<Tile, kWeights> release_;
  RingPosition<Tile::template kStages<kWeights>> ring_;
};

template <class Tile, Weights kWeights, Weights kUsed, class Problem>
__device__ void multiply(const CUtensorMap& out_map, const Problem& p,
                         const SharedMemory<Tile, kWeights>& shared, char* shared_base) {
  const SharedConstants<Tile> constants(shared_base + (shared.constants() - shared.base));
  ptx::griddepcontrol_wait();  // for x_scale, the workspace and `out`

  WorkList<Tile> list(p);
  Work work;
  MainLoop<Tile, kWeights, kUsed> loop(shared);
  while (list.next(work)) {
    const TilePosition at = position<Tile>(work.tile, p);
    const int copy_tokens = tokens_of_copy<Tile>(at, p);
    Constants<Tile> fetched;
    fetched.fetch(p, at, threadIdx.x);

    Accumulators<Tile> acc;
#pragma unroll
    for (int b = 0; b < Tile::kWeightBlocks; ++b)
#pragma unroll
      for (int i = 0; i < Tile::kAccumulators; ++i) acc[b][i] = 0;

    loop.run(acc, steps_of_block<Tile>(work), copy_tokens);

    constants.store(fetched, threadIdx.x);
    OutAccumulators<Tile> sums;
    add_up_groups<Tile, kWeights>(acc, sums, shared);
    const bool is_whole = work.end - work.begin == p.steps;
    if (is_whole) {
      ptx::named_barrier_sync(1, Tile::kConsumers);
    } else if (!add_to_others<Tile, kWeights>(sums, p, work, shared, shared_base)) {
      continue;
    }
    write_output<Tile, kWeights>(sums, out_map, p, at, shared, shared_base);
    ptx::named_barrier_sync(1, Tile::kConsumers);  // the constants may be overwritten
  }
  ptx::cp_async_bulk_wait_group_read<0>();
}

// Problem is Params, or ExpertParams for a mixture of experts.
template <class Tile, Weights kWeights, class Problem>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    w4a8_gemm_hopper(const __grid_constant__ CUtensorMap x_map,
                     const __grid_constant__ CUtensorMap x_tail_map,
                     const __grid_constant__ CUtensorMap out_map,
                     const __grid_constant__ Problem problem) {
  static_assert(Tile::template kFits<kWeights>);
  static_assert(!Tile::kByInputs || !kIsNested<kWeights>);
  extern __shared__ char unaligned[];
  const uint32_t offset = -ptx::shared_address(unaligned) & 1023;
  char* shared_base = unaligned + offset;
  const SharedMemory<Tile, kWeights> shared{ptx::shared_address(shared_base)};

  ptx::griddepcontrol_launch_dependents();
  const auto& p = counted(problem);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::template kStages<kWeights>; ++i) {
      ptx::mbarrier_init(shared.full(i), 1 + Tile::kWeightLoaders);
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
    const int loader = (threadIdx.x - Tile::kConsumers) / 32;
    if (threadIdx.x % 32 > 0 || loader > Tile::kWeightLoaders) return;
    if (loader == 0) {
      load_x<Tile, kWeights>(x_map, x_tail_map, p, shared);
    } else {
      load_weights<Tile, kWeights>(p, shared, loader - 1);
    }
  } else {
    ptx::setmaxnreg_increase<Tile::kMultiplyRegisters>();
    if constexpr (kIsNested<kWeights>) {
      if (uses_residual<kWeights>(p)) {
        multiply<Tile, kWeights, kWeights>(out_map, p, shared, shared_base);
      } else {
        multiply<Tile, kWeights, kFirstPlane<kWeights>>(out_map, p, shared, shared_base);
      }
    } else {
      multiply<Tile, kWeights, kWeights>(out_map, p, shared, shared_base);
    }
    // Others may still read what is in shared memory here, or arrive at its barriers.
    if (Tile::kCluster > 1) {
      __syncwarp();
      ptx::cluster_arrive_relaxed();
      ptx::cluster_wait();
    }
  }
}

}  // namespace qoq::w4a8
