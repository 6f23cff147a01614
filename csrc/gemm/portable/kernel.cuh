// out^T = W x^T on every card from sm_80: the same packed weights, sums and output as on Hopper
// (gemm/hopper/kernel.cuh), with instructions that all of them have.
//
//   weights  --cp.async--> shared ring --16-byte loads--> registers --4 to 8 bits--> mma
//   x        --cp.async--> shared ring, swizzled -------ldmatrix------------------> mma
//
// The share of a warp of wgmma's register operand, 16 channels, is the operand of mma. So is its
// share of the sums. All warps load and multiply, a stage at a time: in each step every thread
// begins its copies of a later stage as soon as that is free, waits until the copies of all threads
// for this one have arrived, and multiplies. Nothing else holds warps together. The first stages of
// a piece of work are fetched while the output of the piece before is written.
#pragma once

#include "common/mma.cuh"
#include "common/ptx.cuh"
#include "gemm/portable/epilogue.cuh"
#include "gemm/portable/load.cuh"
#include "gemm/portable/tiles.h"
#include "gemm/w4a8_unpack.cuh"

namespace qoq::w4a8::portable {

// Multiplies this warp's part of a stage. The weights lie there as kWeights and are multiplied as
// kUsed, since the first plane of a nested weight is a grouped one.
template <class Tile, Weights kWeights, Weights kUsed>
class Multiplier {
 public:
  __device__ explicit Multiplier(uint32_t ring) {
    const WarpPlace<Tile> place;
    const int lane = threadIdx.x % 32;
    // All slabs of a warp are in one block, or one in each quarter of it.
    const int slab = place.channels * Tile::kSlabs;
    const uint32_t block = ring + Tile::kXBytes + slab / 4 * Tile::template kWeightBytes<kWeights>;
    // Warps that divide k have a k_block each, or half of one.
    const int part = Tile::kStepBlocks == 2 ? place.inputs * Tile::template kPartBytes<kWeights> : 0;
    const int first_half = kHalves == 1 ? place.inputs : 0;
    codes_ = block + part + first_half * kHalfBytes + slab % 4 * 512 + lane * 16;
    params_ = block + part + kCodeBytes + slab % 4 * 32 + lane / 4 * 4;
    // Lane l has the address of token l % 8 + 8 (l / 16), piece l / 8 % 2 of a k32 step.
    const int token = place.tokens * Tile::kWarpTokens + lane % 8 + lane / 16 * 8;
    const int piece = 4 * first_half + lane / 8 % 2;
    x_ = ring + part + token % Tile::kTokens * kBlockK + (piece ^ token % 8) * 16;
  }

  __device__ void operator()(Accumulators<Tile>& acc, uint32_t stage_offset) const {
    uint32_t params[Tile::kSlabs];
#pragma unroll
    for (int s = 0; s < Tile::kSlabs; ++s)
      params[s] = kHasGroups<kWeights> ? ptx::load_shared_4(params_ + stage_offset + 32 * s) : 0;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      uint32_t b[2][Tile::kOctets][2];
#pragma unroll
      for (int step = 0; step < 2; ++step) load_x(b[step], stage_offset, 2 * half + step);
#pragma unroll
      for (int s = 0; s < Tile::kSlabs; ++s) {
        const uint32_t at = codes_ + stage_offset + half * kHalfBytes + 512 * s;
        const uint4 codes = ptx::load_shared_16(at);
        uint4 residual{};
        if constexpr (kUsed == Weights::kNested)
          residual = ptx::load_shared_16(at + kBlockBytes<kWeights>);
        uint32_t a[8];
        unpack_half<kUsed>(codes, residual, params[s], a);
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
          for (int o = 0; o < Tile::kOctets; ++o)
            ptx::mma_m16n8k32_u8s8(acc[s][o], a + 4 * step, b[step][o]);
      }
    }
  }

 private:
  static constexpr int kHalfBytes = kCodeBytes / 2;
  static constexpr int kHalves = 2 * Tile::kStepBlocks / Tile::kInputWarps;  // of a warp

  // The operand of all tokens in a k32 step of this warp. Steps are bits of an address that the
  // swizzle leaves alone but for an exclusive or; tokens further are multiples of 8 rows.
  __device__ void load_x(uint32_t (&b)[Tile::kOctets][2], uint32_t stage_offset, int step) const {
    const uint32_t at = (x_ + stage_offset) ^ (32 * step);
    if constexpr (Tile::kOctets == 1) {
      ptx::ldmatrix_x2(b[0], at);
    } else {
#pragma unroll
      for (int o = 0; o < Tile::kOctets; o += 2) {
        uint32_t r[4];
        ptx::ldmatrix_x4(r, at + o * 8 * kBlockK);
        b[o][0] = r[0], b[o][1] = r[1], b[o + 1][0] = r[2], b[o + 1][1] = r[3];
      }
    }
  }

  uint32_t codes_, params_, x_;
};

// Does all of this block's pieces of work.
template <class Tile, Weights kWeights, Weights kUsed>
__device__ void multiply(const Params& p, char* shared) {
  const uint32_t base = ptx::shared_address(shared), ring = base + Tile::kRing;
  const SharedConstants<Tile> constants(shared);
  auto* is_last = reinterpret_cast<int*>(shared + Tile::kFlag);
  const Multiplier<Tile, kWeights, kUsed> multiply_stage(ring);
  const RingBarriers<Tile> barriers{base + Tile::kBarriers};
  barriers.initialise();
  Loader<Tile, kWeights, kUsed> loader(p, ring, barriers);
  RingPlace place;
  WorkList<Tile> list(p);
  Work work;
  bool has_work = list.next(work);
  if (!has_work) return;
  loader.turn_to(position<Tile>(work.tile, p));
  // For x, x_scale, the workspace and `out`.
  loader.begin(work.begin, work.end, [] { ptx::griddepcontrol_wait(); });
  while (has_work) {
    Constants<Tile> fetched;
    auto fetch = [&](TilePosition at) {
      fetched.fetch(p, at.m * Tile::kTokens, at.n * Tile::kChannels, threadIdx.x);
    };
    if constexpr (Tile::kFetchesEarly) fetch(position<Tile>(work.tile, p));

    Accumulators<Tile> acc;
#pragma unroll
    for (int s = 0; s < Tile::kSlabs; ++s)
#pragma unroll
      for (int o = 0; o < Tile::kOctets; ++o)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[s][o][i] = 0;

    for (int step = work.begin; step < work.end; ++step) {
      if (const int later = step + loader.ahead(); later < work.end) loader.load(later);
      ptx::mbarrier_wait(barriers.full(place.stage), place.parity);
      multiply_stage(acc, place.stage * Tile::template kStageBytes<kWeights>);
      __syncwarp();
      ptx::mbarrier_arrive_if(threadIdx.x % 32 == 0, barriers.free(place.stage));
      place.advance(p.stages);
    }
    __syncthreads();  // nobody reads the ring or the constants of the tile before any more

    OutAccumulators<Tile> sums;
    add_up_warps<Tile>(acc, sums, ring);
    const Work done = work;
    const TilePosition at = position<Tile>(work.tile, p);
    if constexpr (!Tile::kFetchesEarly) fetch(at);
    constants.store(fetched, threadIdx.x);
    __syncthreads();

    has_work = list.next(work);
    if (has_work) {
      loader.turn_to(position<Tile>(work.tile, p));
      loader.begin(work.begin, work.end, [] {});
    }
    if (done.end - done.begin < p.steps) {
      const WarpPlace<Tile> place;
      constexpr int kCount = Tile::kSlabs * Tile::kOutOctets * 4;
      if (!add_to_shared_tile<Tile, Tile::kThreads, kCount>(&sums[0][0][0], place.writes(), p,
                                                            done.tile - p.whole_tiles,
                                                            done.end - done.begin, is_last))
        continue;
    }
    write_output<Tile, kWeights>(sums, p, at, constants, base + Tile::kOutput);
  }
}

template <class Tile, Weights kWeights>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    w4a8_gemm_portable(const __grid_constant__ Params p) {
  extern __shared__ char unaligned[];
  char* shared = unaligned + (-ptx::shared_address(unaligned) & 127);
  ptx::griddepcontrol_launch_dependents();
  if constexpr (kWeights == Weights::kNested) {
    if (uses_residual<kWeights>(p)) {
      multiply<Tile, kWeights, Weights::kNested>(p, shared);
    } else {
      multiply<Tile, kWeights, Weights::kGrouped>(p, shared);
    }
  } else {
    multiply<Tile, kWeights, kWeights>(p, shared);
  }
}

}  // namespace qoq::w4a8::portable
