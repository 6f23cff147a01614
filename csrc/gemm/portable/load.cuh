// From global memory into the ring, by all threads of a block.
#pragma once

#include "common/cp_async.cuh"
#include "common/ptx.cuh"
#include "gemm/portable/tiles.h"
#include "gemm/w4a8_work.cuh"

namespace qoq::w4a8::portable {

// A stage of the ring, and how often the ring was gone through before, as the parity of barriers.
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance(int stages) {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
};

// Each stage has two barriers: one is complete when the copies of all threads have arrived, the
// other when all warps have read them. So a warp may be ahead of another by some steps, and one
// multiplies while another unpacks.
template <class Tile>
struct RingBarriers {
  uint32_t base;

  __device__ uint32_t full(int stage) const { return base + 16 * stage; }
  __device__ uint32_t free(int stage) const { return base + 16 * stage + 8; }

  __device__ void initialise() const {
    if (threadIdx.x < Tile::kMaxStages) {
      ptx::mbarrier_init(full(threadIdx.x), Tile::kThreads);
      ptx::mbarrier_init(free(threadIdx.x), Tile::kThreads / 32);
    }
    __syncthreads();
  }
};

// Loads the stages of one piece of work after the other, 16 bytes of a thread at a time. A nested
// weight has both planes in memory; the second is fetched where kUsed is nested, too.
template <class Tile, Weights kWeights, Weights kUsed>
class Loader {
 public:
  __device__ Loader(const Params& p, uint32_t ring, RingBarriers<Tile> barriers)
      : p_(p), ring_(ring), barriers_(barriers) {}

  // Stages that are loaded before their turn. Where the ring has three or more, one more is left
  // for the warps that are behind.
  __device__ int ahead() const { return max(1, p_.stages - 2); }

  // Turns to the tile at this position.
  __device__ void turn_to(TilePosition at) {
    const int block = at.n * Tile::kBlocks;
    last_block_ = p_.weight_blocks - 1 - block;
    first_block_ = block * p_.k_blocks;
    // Past the last token there are zeros.
    const int token = at.m * Tile::kTokens + row() % Tile::kTokens;
    tokens_left_ = p_.m - token;
    x_ = p_.x + int64_t{token} * p_.k_blocks * kBlockK + threadIdx.x % kPieces * 16;
  }

  // Fetches a step as soon as its stage is free.
  __device__ void load(int step) {
    wait_until_free(place_);
    load_weights(step, place_.stage);
    load_x(step);
  }

  // Fetches the first steps of a piece of work. The weights do not depend on the kernel before this
  // one, which `between` may wait for.
  template <class BetweenWeightsAndX>
  __device__ void begin(int begin, int end, BetweenWeightsAndX between) {
    const int last = min(end, begin + ahead());
    RingPlace place = place_;
#pragma unroll 1
    for (int step = begin; step < last; ++step) {
      wait_until_free(place);
      load_weights(step, place.stage);
      place.advance(p_.stages);
    }
    between();
#pragma unroll 1
    for (int step = begin; step < last; ++step) load_x(step);
  }

 private:
  static constexpr int kBytes = kBlockBytes<kWeights>;
  static constexpr int kStageBytes = Tile::template kStageBytes<kWeights>;
  static constexpr int kPartBytes = Tile::template kPartBytes<kWeights>;
  static constexpr int kWeightBytes = Tile::template kWeightBytes<kWeights>;
  static constexpr int kPieces = kBlockK / 16;            // of a token's row
  static constexpr int kRows = Tile::kThreads / kPieces;  // that all threads copy at a time
  static constexpr int kParamPieces = kParamBytes / 16;
  static_assert(kCodeBytes == 16 * Tile::kThreads);

  __device__ static int row() { return threadIdx.x / kPieces; }

  __device__ void wait_until_free(const RingPlace& place) const {
    ptx::mbarrier_wait(barriers_.free(place.stage), place.parity ^ 1);
  }

  // Whether there is a k_block: the last step may have fewer than the others.
  __device__ bool has(int k_block) const {
    return Tile::kStepBlocks == 1 || k_block < p_.k_blocks;
  }

  __device__ void load_weights(int step, int stage) const {
#pragma unroll
    for (int part = 0; part < Tile::kStepBlocks; ++part) {
      const int k_block = step * Tile::kStepBlocks + part;
      if (!has(k_block)) break;
      const uint32_t to = ring_ + stage * kStageBytes + part * kPartBytes + Tile::kXBytes;
      const uint8_t* weight =
          p_.weight + int64_t{first_block_ + k_block} * kBytes + 16 * threadIdx.x;
#pragma unroll
      for (int b = 0; b < Tile::kBlocks; ++b)
        ptx::cp_async_16(to + b * kWeightBytes + 16 * threadIdx.x, weight + stride(b, kBytes));
      if constexpr (kHasGroups<kWeights>) {
        if (threadIdx.x < kParamPieces * Tile::kBlocks) {
          const int b = threadIdx.x / kParamPieces, piece = threadIdx.x % kParamPieces;
          ptx::cp_async_16(to + b * kWeightBytes + kCodeBytes + 16 * piece,
                           weight + stride(b, kBytes) + kCodeBytes - 16 * (threadIdx.x - piece));
        }
      }
      if constexpr (kUsed == Weights::kNested) {
        const uint8_t* residual =
            p_.residual + int64_t{first_block_ + k_block} * kCodeBytes + 16 * threadIdx.x;
#pragma unroll
        for (int b = 0; b < Tile::kBlocks; ++b)
          ptx::cp_async_16(to + b * kWeightBytes + kBytes + 16 * threadIdx.x,
                           residual + stride(b, kCodeBytes));
      }
    }
  }

  // Fetches x of a step, each token a row of 128 bytes in which piece i lies at i ^ (token % 8), and
  // goes on to the next stage. The rows of all parts are one after the other.
  __device__ void load_x(int step) {
    constexpr int kAllRows = Tile::kStepBlocks * Tile::kTokens;
    const int piece = threadIdx.x % kPieces;
    if (kAllRows >= kRows || row() < kAllRows) {
      const uint32_t to = ring_ + place_.stage * kStageBytes + row() / Tile::kTokens * kPartBytes +
                          row() % Tile::kTokens * kBlockK + (piece ^ row() % 8) * 16;
#pragma unroll
      for (int first = 0; first < kAllRows; first += kRows) {
        const int part = first / Tile::kTokens, token = first % Tile::kTokens;
        const int k_block = step * Tile::kStepBlocks + part + row() / Tile::kTokens;
        const bool is_there = token < tokens_left_ && has(k_block);
        const int8_t* from = x_ + (token * p_.k_blocks + k_block) * kBlockK;
        ptx::cp_async_16_or_zeros(to + part * kPartBytes + token * kBlockK,
                                  is_there ? from : p_.x, is_there);
      }
    }
    ptx::cp_async_mbarrier_arrive(barriers_.full(place_.stage));
    place_.advance(p_.stages);
  }

  // Bytes from the first block of channels to the b-th, of this many bytes. Past the last channel
  // any block will do, since nothing of it is written.
  __device__ int stride(int b, int bytes) const {
    return min(b, last_block_) * (p_.k_blocks * bytes);
  }

  const Params& p_;
  const uint32_t ring_;
  const RingBarriers<Tile> barriers_;
  RingPlace place_;  // of the next stage
  // What is held is little, since the largest tile has no register to spare.
  int first_block_, last_block_, tokens_left_;
  const int8_t* x_;
};

}  // namespace qoq::w4a8::portable
