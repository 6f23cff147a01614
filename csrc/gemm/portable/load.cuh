// From global memory into the ring, by all threads of a block.
#pragma once

#include "common/cp_async.cuh"
#include "common/ptx.cuh"
#include "gemm/portable/tiles.h"
#include "gemm/w4a8_work.cuh"

namespace qoq::w4a8::portable {

// Waits until all but the latest `pending` groups of this thread have arrived.
__device__ inline void wait_for_all_but(int pending) {
  switch (pending) {
    case 0:
      return ptx::cp_async_wait_group<0>();
    case 1:
      return ptx::cp_async_wait_group<1>();
    case 2:
      return ptx::cp_async_wait_group<2>();
    case 3:
      return ptx::cp_async_wait_group<3>();
    case 4:
      return ptx::cp_async_wait_group<4>();
    case 5:
      return ptx::cp_async_wait_group<5>();
    default:
      return ptx::cp_async_wait_group<6>();
  }
}

// Loads the stages of one piece of work after the other, 16 bytes of a thread at a time. A nested
// weight has both planes in memory; the second is fetched where kUsed is nested, too.
template <class Tile, Weights kWeights, Weights kUsed>
class Loader {
 public:
  __device__ Loader(const Params& p, uint32_t ring) : p_(p), ring_(ring) {}

  // Turns to the tile at this position.
  __device__ void turn_to(TilePosition at) {
    const int thread = threadIdx.x;
    const int block = at.n * Tile::kBlocks;
    last_block_ = p_.weight_blocks - 1 - block;
    first_block_ = block * p_.k_blocks;
    // Past the last token there are zeros.
    const int token = at.m * Tile::kTokens + thread / kPieces;
    tokens_left_ = p_.m - token;
    x_ = p_.x + int64_t{token} * p_.k_blocks * kBlockK + thread % kPieces * 16;
  }

  // Fetches the weights of a step, which do not depend on the kernel before this one.
  __device__ void load_weights(int step, int stage) const {
    const uint32_t to = ring_ + stage * Tile::template kStageBytes<kWeights> + Tile::kXBytes;
    const uint8_t* weight = p_.weight + int64_t{first_block_ + step} * kBytes + 16 * threadIdx.x;
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
          p_.residual + int64_t{first_block_ + step} * kCodeBytes + 16 * threadIdx.x;
#pragma unroll
      for (int b = 0; b < Tile::kBlocks; ++b)
        ptx::cp_async_16(to + b * kWeightBytes + kBytes + 16 * threadIdx.x,
                         residual + stride(b, kCodeBytes));
    }
  }

  // Fetches x of a step, each token a row of 128 bytes in which piece i lies at i ^ (token % 8).
  __device__ void load_x(int step, int stage) const {
    const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
    if (Tile::kTokens < kRows && row >= Tile::kTokens) return;
    const uint32_t to = ring_ + stage * Tile::template kStageBytes<kWeights> + row * kBlockK +
                        (piece ^ row % 8) * 16;
    const int8_t* from = x_ + step * kBlockK;
#pragma unroll
    for (int first = 0; first < Tile::kTokens; first += kRows) {
      const bool is_there = first < tokens_left_;
      ptx::cp_async_16_or_zeros(to + first * kBlockK,
                                is_there ? from + first * (p_.k_blocks * kBlockK) : p_.x, is_there);
    }
  }

  // Fills the ring with the first of `steps` steps from `begin`, and leaves one stage empty. The
  // groups are as many whatever there is to fetch, since they are what is waited for.
  template <class BetweenWeightsAndX>
  __device__ void begin(int begin, int end, BetweenWeightsAndX between) const {
    for (int i = 0; i < p_.stages - 1; ++i)
      if (begin + i < end) load_weights(begin + i, i);
    between();
    for (int i = 0; i < p_.stages - 1; ++i) {
      if (begin + i < end) load_x(begin + i, i);
      ptx::cp_async_commit_group();
    }
  }

 private:
  static constexpr int kBytes = kBlockBytes<kWeights>;
  static constexpr int kWeightBytes = Tile::template kWeightBytes<kWeights>;
  static constexpr int kPieces = kBlockK / 16;            // of a token's row
  static constexpr int kRows = Tile::kThreads / kPieces;  // that all threads copy at a time
  static constexpr int kParamPieces = kParamBytes / 16;
  static_assert(kCodeBytes == 16 * Tile::kThreads);

  // Bytes from the first block of channels to the b-th, of this many bytes. Past the last channel
  // any block will do, since nothing of it is written.
  __device__ int stride(int b, int bytes) const {
    return min(b, last_block_) * (p_.k_blocks * bytes);
  }

  const Params& p_;
  const uint32_t ring_;
  // What is held is little, since the largest tile has no register to spare.
  int first_block_, last_block_, tokens_left_;
  const int8_t* x_;
};

}  // namespace qoq::w4a8::portable
