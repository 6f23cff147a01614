// out^T = W x^T on every card from sm_80: the same packed weights, sums and output as on Hopper
// (gemm/hopper/kernel.cuh), with instructions that all of them have.
//
//   weights  --cp.async--> shared ring --16-byte loads--> registers --4 to 8 bits--> mma
//   x        --cp.async--> shared ring, swizzled -------ldmatrix------------------> mma
//
// The share of a warp of wgmma's register operand, 16 channels, is the operand of mma. So is its
// share of the sums. Warps go through the stages of the ring each at its own pace.
#pragma once

#include "common/mma.cuh"
#include "common/ptx.cuh"
#include "gemm/portable/epilogue.cuh"
#include "gemm/portable/load.cuh"
#include "gemm/portable/tiles.h"
#include "gemm/w4a8_unpack.cuh"

namespace qoq::w4a8::portable {

// Multiplies this warp's part of the stages, 32 inputs (a k32 step) and 16 channels at a time.
// While the tensor cores work on one of these, the operand of the next is unpacked, and x of the
// next k32 step and the codes of the next 64 inputs are read, over the end of a stage, too.
//
// The weights lie there as kWeights and are multiplied as kUsed, since the first plane of a nested
// weight is a grouped one.
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
    const int part =
        Tile::kStepBlocks == 2 ? place.inputs * Tile::template kPartBytes<kWeights> : 0;
    const int first_half = kHalves == 1 ? place.inputs : 0;
    codes_at_ = block + part + first_half * kHalfBytes + slab % 4 * 512 + lane * 16;
    params_at_ = block + part + kCodeBytes + slab % 4 * (8 * kRowBytes) + lane / 4 * kRowBytes;
    if constexpr (kKGroups > 1) params_at_ += first_half * (kRowBytes / 2);
    // Lane l has the address of token l % 8 + 8 (l / 16), piece l / 8 % 2 of a k32 step.
    const int token = place.tokens * Tile::kWarpTokens + lane % 8 + lane / 16 * 8;
    const int piece = 4 * first_half + lane / 8 % 2;
    x_at_ = ring + part + token % Tile::kTokens * kBlockK + (piece ^ token % 8) * 16;
  }

  // Reads what the first stage of a piece of work begins with.
  __device__ void begin(uint32_t stage_offset) {
    load_x(b_[0], stage_offset, 0);
#pragma unroll
    for (int s = 0; s < Tile::kSlabs; ++s) load_codes(s, stage_offset, 0);
    unpack(0, 0);
  }

  // Multiplies a stage, and reads the beginning of the next one, for which `wait_for_next` waits.
  // `release` is called when this one has been read.
  template <class WaitForNext, class Release>
  __device__ void multiply(Accumulators<Tile>& acc, uint32_t stage_offset, uint32_t next_offset,
                           WaitForNext wait_for_next, Release release) {
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      const bool is_last = t == kSteps - 1;
      if (is_last) wait_for_next();
      load_x(b_[(t + 1) % 2], is_last ? next_offset : stage_offset, (t + 1) % kSteps);
      if (t == kSteps - 2) release();
#pragma unroll
      for (int s = 0; s < Tile::kSlabs; ++s) {
        // The codes of a slab are two k32 steps, of which the second is unpacked.
        if (t % 2 == 1) load_codes(s, is_last ? next_offset : stage_offset, (t + 1) / 2 % kHalves);
        const uint32_t a[4] = {a_[0], a_[1], a_[2], a_[3]};
#pragma unroll
        for (int o = 0; o < Tile::kOctets; ++o) {
          if (o == Tile::kOctets / 2)
            unpack((t + (s + 1) / Tile::kSlabs) % 2, (s + 1) % Tile::kSlabs);
          ptx::mma_m16n8k32_u8s8(acc[s][o], a, b_[t % 2][o]);
        }
      }
    }
  }

 private:
  static constexpr int kHalfBytes = kCodeBytes / 2;
  static constexpr int kKGroups = w4a8::kKGroups<kWeights>;
  static constexpr int kRowBytes = 4 * kKGroups;            // the parameters of two rows
  static constexpr int kHalfGroups = kKGroups > 2 ? 2 : 1;  // groups that a half has its own of
  static constexpr int kHalves = 2 * Tile::kStepBlocks / Tile::kInputWarps;  // of a warp
  static constexpr int kSteps = 2 * kHalves;

  // Reads the operand of all tokens in a k32 step of this warp. Steps are bits of an address that
  // the swizzle leaves alone but for an exclusive or; tokens further are multiples of 8 rows.
  __device__ void load_x(uint32_t (&b)[Tile::kOctets][2], uint32_t stage_offset, int step) const {
    const uint32_t at = (x_at_ + stage_offset) ^ (32 * step);
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

  // Reads the codes of 64 inputs of a slab, and where a group begins with them its parameters.
  __device__ void load_codes(int s, uint32_t stage_offset, int half) {
    const uint32_t at = codes_at_ + stage_offset + half * kHalfBytes + 512 * s;
    codes_[s] = ptx::load_shared_16(at);
    if constexpr (kIsNested<kUsed>) residual_[s] = ptx::load_shared_16(at + kBlockBytes<kWeights>);
    if constexpr (kKGroups > 1)
      load_params(params_at_ + stage_offset + half * (kRowBytes / 2) + 8 * kRowBytes * s,
                  params_[s]);
    else if (kKGroups == 1 && half == 0)
      load_params(params_at_ + stage_offset + 8 * kRowBytes * s, params_[s]);
  }

  // Unpacks one of the two k32 steps that are in the codes of a slab.
  __device__ void unpack(int step, int s) {
    const uint4 &c = codes_[s], &r = residual_[s];
    if (step == 0)
      unpack_step<kUsed>({c.x, c.y}, {r.x, r.y}, params_[s][0], a_);
    else
      unpack_step<kUsed>({c.z, c.w}, {r.z, r.w}, params_[s][kHalfGroups - 1], a_);
  }

  uint32_t codes_at_, params_at_, x_at_;
  uint32_t b_[2][Tile::kOctets][2], a_[4], params_[Tile::kSlabs][kHalfGroups] = {};
  uint4 codes_[Tile::kSlabs], residual_[Tile::kSlabs] = {};
};

// Later kernels take the end of this one for that of the one before it, so a grid of experts in
// which no block has work waits for it, too.
__device__ inline void wait_without_work(const Params&) {}
__device__ inline void wait_without_work(const ExpertParams&) { ptx::griddepcontrol_wait(); }

// Does all of this block's pieces of work.
template <class Tile, Weights kWeights, Weights kUsed, class Problem>
__device__ void multiply(const Problem& p, char* shared) {
  const uint32_t base = ptx::shared_address(shared), ring = base + Tile::kRing;
  const RingBarriers<Tile> barriers{base + Tile::kBarriers};
  barriers.initialise();
  Loader<Tile, kWeights, kUsed, Problem> loader(p, ring, barriers);
  WorkList<Tile> list(p);
  Work work;
  if (Tile::kLoadWarps > 0 && threadIdx.x >= Tile::kThreads) {
    for (bool is_first = true; list.next(work); is_first = false) {
      loader.turn_to(position<Tile>(work.tile, p));
      int step = is_first ? loader.begin(work, p.stages) : work.begin;
      for (; step < work.end; ++step) loader.load(step);
    }
    ptx::cp_async_wait_all();  // before the thread ends
    wait_without_work(p);
    return;
  }
  // Where all warps load, a stage is left for those that are behind.
  const int ahead = max(1, p.stages - 2);
  const SharedConstants<Tile> constants(shared);
  auto* is_last = reinterpret_cast<int*>(shared + Tile::kFlag);
  Multiplier<Tile, kWeights, kUsed> multiplier(ring);
  RingPlace place;
  bool has_work = list.next(work);
  if (!has_work) {
    wait_without_work(p);
    return;
  }
  if constexpr (Tile::kLoadWarps == 0) {
    loader.turn_to(position<Tile>(work.tile, p));
    loader.begin(work, ahead);
  }
  ptx::griddepcontrol_wait();  // for x_scale, the workspace and `out`
  while (has_work) {
    const TilePosition at = position<Tile>(work.tile, p);
    Constants<Tile> fetched;
    const auto fetch = [&] { fetched.fetch(p, at, threadIdx.x); };
    if constexpr (Tile::kFetchesEarly) fetch();

    Accumulators<Tile> acc;
#pragma unroll
    for (int s = 0; s < Tile::kSlabs; ++s)
#pragma unroll
      for (int o = 0; o < Tile::kOctets; ++o)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[s][o][i] = 0;

    constexpr int kStageBytes = Tile::template kStageBytes<kWeights>;
    ptx::mbarrier_wait(barriers.full(place.stage), place.parity);
    multiplier.begin(place.stage * kStageBytes);
    for (int step = work.begin; step < work.end; ++step) {
      RingPlace next = place;
      next.advance(p.stages);
      // To ask takes a while, so that the answer is not awaited before it is needed.
      const bool has_next =
          step + 1 == work.end || ptx::mbarrier_try_wait(barriers.full(next.stage), next.parity);
      if constexpr (Tile::kLoadWarps == 0)
        if (step + ahead < work.end) loader.load(step + ahead);
      multiplier.multiply(
          acc, place.stage * kStageBytes, next.stage * kStageBytes,
          [&] {
            if (!has_next) ptx::mbarrier_wait(barriers.full(next.stage), next.parity);
          },
          [&] {
            __syncwarp();
            ptx::mbarrier_arrive_if(threadIdx.x % 32 == 0, barriers.free(place.stage));
          });
      place = next;
    }

    OutAccumulators<Tile> sums;
    add_up_warps<Tile>(acc, sums, base + Tile::kExchange);
    if constexpr (!Tile::kFetchesEarly) fetch();
    ptx::named_barrier_sync(1, Tile::kThreads);  // nobody reads the constants of another tile
    constants.store(fetched, threadIdx.x);
    ptx::named_barrier_sync(1, Tile::kThreads);

    const Work done = work;
    has_work = list.next(work);
    if constexpr (Tile::kLoadWarps == 0) {
      if (has_work) {
        loader.turn_to(position<Tile>(work.tile, p));
        loader.begin(work, ahead);
      }
    }
    if (done.end - done.begin < p.steps) {
      const WarpPlace<Tile> warp;
      constexpr int kCount = Tile::kSlabs * Tile::kOutOctets * 4;
      if (!add_to_shared_tile<Tile, Tile::kThreads, kCount>(&sums[0][0][0], warp.writes(), p,
                                                            done.tile - p.whole_tiles,
                                                            done.end - done.begin, is_last))
        continue;
    }
    write_output<Tile, kWeights>(sums, p, at, constants, base + Tile::kOutput);
  }
}

// Problem is Params, or ExpertParams for a mixture of experts.
template <class Tile, Weights kWeights, class Problem>
__global__ void __launch_bounds__(Tile::kBlockThreads, Tile::kResident)
    w4a8_gemm_portable(const __grid_constant__ Problem problem) {
  extern __shared__ char unaligned[];
  char* shared = unaligned + (-ptx::shared_address(unaligned) & 127);
  ptx::griddepcontrol_launch_dependents();
  const auto& p = counted(problem);
  if constexpr (kIsNested<kWeights>) {
    if (uses_residual<kWeights>(p)) {
      multiply<Tile, kWeights, kWeights>(p, shared);
    } else {
      multiply<Tile, kWeights, kFirstPlane<kWeights>>(p, shared);
    }
  } else {
    multiply<Tile, kWeights, kWeights>(p, shared);
  }
}

}  // namespace qoq::w4a8::portable
