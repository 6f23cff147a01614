// From global memory into the ring, 16 bytes of a thread at a time.
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

// Each stage has two barriers: one is complete when the copies of all threads that load have
// arrived, the other when all warps that multiply have read them.
template <class Tile>
struct RingBarriers {
  uint32_t base;

  __device__ uint32_t full(int stage) const { return base + 16 * stage; }
  __device__ uint32_t free(int stage) const { return base + 16 * stage + 8; }

  __device__ void initialise() const {
    if (threadIdx.x < Tile::kMaxStages) {
      ptx::mbarrier_init(full(threadIdx.x), Tile::kLoadThreads);
      ptx::mbarrier_init(free(threadIdx.x), Tile::kThreads / 32);
    }
    __syncthreads();
  }
};

// Loads the stages of one piece of work after the other. A nested weight has both planes in memory;
// the second is fetched where kUsed is nested, too. In the place of what lies past the last
// channel, token or input there are zeros.
template <class Tile, Weights kWeights, Weights kUsed, class Problem>
class Loader {
 public:
  __device__ Loader(const Problem& p, uint32_t ring, RingBarriers<Tile> barriers)
      : p_(p), barriers_(barriers), thread_(threadIdx.x % Tile::kLoadThreads) {
    const int row = thread_ / kRowPieces, piece = thread_ % kRowPieces;
    to_weights_ = ring + Tile::kXBytes + thread_ * kPiece;
    to_x_ = ring + row * kBlockK + (piece ^ row % 8) * kPiece;
  }

  // Turns to the tile at this position.
  __device__ void turn_to(TilePosition at) {
    const int block = at.n * Tile::kBlocks;
    blocks_left_ = p_.weight_blocks - block;
    const int first = expert_of(p_, at.m) * p_.weight_blocks + block;
    weight_ = p_.weight + int64_t{first} * p_.k_blocks * kBytes + thread_ * kPiece;
    if constexpr (kIsNested<kUsed>)
      residual_ = p_.residual + int64_t{first} * p_.k_blocks * kCodeBytes + thread_ * kPiece;
    const int token = at.m * Tile::kTokens + thread_ / kRowPieces;
    tokens_left_ = p_.m - token;
    x_ = p_.x + int64_t{token} * p_.k_blocks * kBlockK + thread_ % kRowPieces * kPiece;
  }

  // Fetches a step as soon as its stage is free.
  __device__ void load(int step) {
    wait_until_free(place_);
    load_weights(step, place_.stage);
    load_x(step);
  }

  // Fetches the first steps of a piece of work, not more than `most`, and returns the next one. The
  // weights do not depend on the kernel before this one; x does.
  __device__ int begin(const Work& work, int most) {
    const int last = min(work.end, work.begin + most);
    RingPlace place = place_;
#pragma unroll 1
    for (int step = work.begin; step < last; ++step) {
      wait_until_free(place);
      load_weights(step, place.stage);
      place.advance(p_.stages);
    }
    ptx::griddepcontrol_wait();
#pragma unroll 1
    for (int step = work.begin; step < last; ++step) load_x(step);
    return last;
  }

 private:
  static constexpr int kBytes = kBlockBytes<kWeights>;
  static constexpr int kStageBytes = Tile::template kStageBytes<kWeights>;
  static constexpr int kPartBytes = Tile::template kPartBytes<kWeights>;
  static constexpr int kWeightBytes = Tile::template kWeightBytes<kWeights>;
  static constexpr int kPiece = 16;                               // bytes of a copy
  static constexpr int kPassBytes = Tile::kLoadThreads * kPiece;  // that all threads copy at a time
  static constexpr int kRowPieces = kBlockK / kPiece;             // of a token's row
  static constexpr int kPassRows = Tile::kLoadThreads / kRowPieces;
  static constexpr int kParamPieces = kKGroups<kWeights> * kParamBytes / kPiece;
  static_assert(kCodeBytes % kPassBytes == 0 && Tile::kTokens % kPassRows == 0);
  static_assert(kParamPieces * Tile::kBlocks <= Tile::kLoadThreads && kPassRows % 4 == 0);

  __device__ void wait_until_free(const RingPlace& place) const {
    ptx::mbarrier_wait(barriers_.free(place.stage), place.parity ^ 1);
  }

  // Whether there is a k_block: the last step may have fewer than the others.
  __device__ bool has(int k_block) const { return Tile::kStepBlocks == 1 || k_block < p_.k_blocks; }

  __device__ void load_weights(int step, int stage) const {
    const uint32_t stride = p_.k_blocks * kBytes;  // from one block of channels to the next
#pragma unroll
    for (int part = 0; part < Tile::kStepBlocks; ++part) {
      const int k_block = step * Tile::kStepBlocks + part;
      const int blocks = has(k_block) ? blocks_left_ : 0;
      const uint32_t to = to_weights_ + stage * kStageBytes + part * kPartBytes;
      const uint8_t* from = weight_ + k_block * kBytes;
#pragma unroll
      for (int b = 0; b < Tile::kBlocks; ++b, from += stride)
        copy_codes(to + b * kWeightBytes, from, b < blocks);
      if constexpr (kHasGroups<kWeights>) {
        if (thread_ < kParamPieces * Tile::kBlocks) {
          const int b = thread_ / kParamPieces, first = b * kParamPieces * kPiece;
          ptx::cp_async_16_or_zeros(to + b * kWeightBytes + kCodeBytes - first,
                                    weight_ + k_block * kBytes + b * stride + (kCodeBytes - first),
                                    b < blocks);
        }
      }
      if constexpr (kIsNested<kUsed>) {
        const uint8_t* residual = residual_ + k_block * kCodeBytes;
#pragma unroll
        for (int b = 0; b < Tile::kBlocks; ++b, residual += p_.k_blocks * kCodeBytes)
          copy_codes(to + b * kWeightBytes + kBytes, residual, b < blocks);
      }
    }
  }

  __device__ static void copy_codes(uint32_t to, const uint8_t* from, bool is_there) {
#pragma unroll
    for (int at = 0; at < kCodeBytes; at += kPassBytes)
      ptx::cp_async_16_or_zeros(to + at, from + at, is_there);
  }

  // Fetches x of a step, each token a row of 128 bytes in which piece i lies at i ^ (token % 8),
  // and goes on to the next stage.
  __device__ void load_x(int step) {
    const uint32_t stride = p_.k_blocks * (kPassRows * kBlockK);
#pragma unroll
    for (int part = 0; part < Tile::kStepBlocks; ++part) {
      const int k_block = step * Tile::kStepBlocks + part;
      const int tokens = has(k_block) ? tokens_left_ : 0;
      const uint32_t to = to_x_ + place_.stage * kStageBytes + part * kPartBytes;
      const int8_t* from = x_ + k_block * kBlockK;
#pragma unroll
      for (int token = 0; token < Tile::kTokens; token += kPassRows, from += stride) {
        const uint32_t at = (to ^ token % 8 * kPiece) + token * kBlockK;
        ptx::cp_async_16_or_zeros(at, from, token < tokens);
      }
    }
    ptx::cp_async_mbarrier_arrive(barriers_.full(place_.stage));
    place_.advance(p_.stages);
  }

  const Problem& p_;
  const RingBarriers<Tile> barriers_;
  const int thread_;
  uint32_t to_weights_, to_x_;  // in the first stage
  RingPlace place_;             // of the next stage
  int blocks_left_, tokens_left_;
  const uint8_t *weight_, *residual_;
  const int8_t* x_;
};

}  // namespace qoq::w4a8::portable
