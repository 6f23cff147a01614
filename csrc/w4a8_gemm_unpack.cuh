// From packed weights to what wgmma reads.
#pragma once

#include "common/ptx.cuh"
#include "w4a8_gemm_config.h"
#include "w4a8_gemm_work.cuh"

namespace qoq::w4a8 {

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

// What one thread of a warpgroup has of a block of 64 channels.
template <class Tile, Weights kWeights>
struct Fragment {
  uint4 codes[2], residual[2];
  uint32_t params;

  __device__ void fetch(const SharedMemory<Tile, kWeights>& shared, int stage, int block) {
    const int thread = threadIdx.x % 128;
    const uint32_t from = shared.weight(stage, block);
    params = kHasGroups<kWeights> ? ptx::load_shared_4(from + kCodeBytes + thread / 4 * 4) : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = half * (kCodeBytes / 2) + thread * 16;
      codes[half] = ptx::load_shared_16(from + at);
      if constexpr (kWeights == Weights::kNested)
        residual[half] = ptx::load_shared_16(shared.residual(stage, block) + at);
    }
  }

  __device__ void unpack(int half, uint32_t (&a)[8]) const {
    unpack_half<kWeights>(codes[half], residual[half], params, a);
  }
};

// A warpgroup that unpacks for others: packed weights of a stage into unpacked ones.
template <class Tile, Weights kWeights>
__device__ void unpack_for_others(const Params& p, const SharedMemory<Tile, kWeights>& shared) {
  constexpr int kCount = Tile::kBlocks / Tile::kUnpackers;
  const int first = (threadIdx.x - Tile::kConsumers) / 128 * kCount;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  // Lane 8 q + i has the address of row i of matrix q, which is 8 rows of 16 inputs.
  const int row = warp * 16 + lane / 8 % 2 * 8 + lane % 8, chunk = lane / 16;

  // Stages come in the order in which they are multiplied, whatever tile they belong to.
  int steps = 0;
  {
    WorkList<Tile> list(p);
    Work work;
    while (list.next(work)) steps += work.end - work.begin;
  }
  RingPosition<Tile::kPackedStages> packed;
  RingPosition<Tile::kUnpackedStages> unpacked;
  using Stage = Fragment<Tile, kWeights>[kCount];
  auto fetch = [&](Stage& fragments) {
    ptx::mbarrier_wait(shared.packed_full(packed.stage), packed.parity);
#pragma unroll
    for (int b = 0; b < kCount; ++b) fragments[b].fetch(shared, packed.stage, first + b);
  };
  auto unpack = [&](const Stage& current, Stage& next, bool has_next) {
    const int stage = packed.stage;
    packed.advance();
    if (has_next) fetch(next);
    ptx::mbarrier_wait(shared.unpacked_empty(unpacked.stage), unpacked.parity ^ 1);
#pragma unroll
    for (int b = 0; b < kCount; ++b) {
      const uint32_t rows = shared.unpacked(unpacked.stage, first + b) + row * kBlockK;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t a[8];
        current[b].unpack(half, a);
        if (b == kCount - 1 && half == 1) {
          __syncwarp();
          ptx::mbarrier_arrive_if(lane == 0, shared.packed_empty(stage));
        }
#pragma unroll
        for (int part = 0; part < 2; ++part)
          ptx::stmatrix_x4(rows + (((4 * half + 2 * part + chunk) ^ (row % 8)) * 16), &a[4 * part]);
      }
    }
    ptx::fence_proxy_async_shared();
    __syncwarp();
    ptx::mbarrier_arrive_if(lane == 0, shared.unpacked_full(unpacked.stage));
    unpacked.advance();
  };
  // One stage is on its way from shared memory while the one before it is unpacked.
  Stage fragments[2];
  if (steps > 0) fetch(fragments[0]);
  for (int i = 0; i < steps; i += 2) {
    unpack(fragments[0], fragments[1], i + 1 < steps);
    if (i + 1 < steps) unpack(fragments[1], fragments[0], i + 2 < steps);
  }
}

}  // namespace qoq::w4a8
