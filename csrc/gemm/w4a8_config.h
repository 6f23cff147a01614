// The numbers of the W4A8 GEMM on every card: what the packed weight looks like, and the
// parameters.
#pragma once

#include <cstdint>

namespace qoq::w4a8 {

// 64 output channels are a block: one wgmma multiplies them, or four warps by mma. 128 inputs are a
// k_block: one, two or four groups of the weights, and a row of 128 bytes of x in its swizzle.
inline constexpr int kBlockN = 64;
inline constexpr int kBlockK = 128;

// Up to kMaxK inputs the sums are exact: 255 * 128 * K < 2^31. kMaxRows limits tokens and channels.
inline constexpr int kMaxK = 1 << 16;
inline constexpr int kMaxRows = 1 << 24;

// A packed block is 64 channels x 128 inputs (`vllm_qoq.ops.w4a8_layout` makes it):
//   codes   [2 halves of k][128 threads][16 bytes]   what one thread's registers hold
//   params  [32 pairs of rows][group][scale, offset + 128 of row r, the same of row r + 8]
// `params` is there only with groups. A nested weight has a second plane of blocks, which are
// `codes` alone: what the weight's 8 bits have more than its 4, plus kResidualZero.
inline constexpr int kCodeBytes = kBlockN * kBlockK / 2;
inline constexpr int kParamBytes = kBlockN * 2;  // of one group
enum class Weights { kChannel, kG128, kG64, kG32, kNestedG128, kNestedG64, kNestedG32 };
inline constexpr int kResidualZero = 8;

// The groups of a k_block, 0 without groups.
constexpr int groups_of_k_block(Weights weights) {
  switch (weights) {
    case Weights::kG128:
    case Weights::kNestedG128:
      return 1;
    case Weights::kG64:
    case Weights::kNestedG64:
      return 2;
    case Weights::kG32:
    case Weights::kNestedG32:
      return 4;
    default:
      return 0;
  }
}

// What a weight is without its second plane.
constexpr Weights first_plane(Weights weights) {
  switch (weights) {
    case Weights::kNestedG128:
      return Weights::kG128;
    case Weights::kNestedG64:
      return Weights::kG64;
    case Weights::kNestedG32:
      return Weights::kG32;
    default:
      return weights;
  }
}

template <Weights kWeights>
inline constexpr int kKGroups = groups_of_k_block(kWeights);
template <Weights kWeights>
inline constexpr bool kHasGroups = kKGroups<kWeights> > 0;
template <Weights kWeights>
inline constexpr Weights kFirstPlane = first_plane(kWeights);
template <Weights kWeights>
inline constexpr bool kIsNested = kFirstPlane<kWeights> != kWeights;
template <Weights kWeights>
inline constexpr int kBlockBytes = kCodeBytes + kKGroups<kWeights> * kParamBytes;
template <Weights kWeights>
inline constexpr int kResidualBytes = kIsNested<kWeights> ? kCodeBytes : 0;

// The workspace is int32: counters, then sums of the tiles that several blocks share. The kernel
// finds it zero and leaves it zero. At most as many tiles are shared as blocks run at a time.
// vllm_qoq/ops/linear_ops.py makes it with the same numbers.
inline constexpr int kCounters = 1024;
inline constexpr int kMaxTileInts = 256 * 128;  // for each multiprocessor

enum class Output : int { kBfloat16, kFloat16 };
enum class Bias : int { kNone, kFloat32, kBfloat16, kFloat16 };

// The kernel computes, for tokens < m and channels < n,
//   out[token, channel] = x_scale (acc channel_scale - x_row_sum channel_zero) + bias
// where `acc` is exact. The rest is float32 in this order, rounded once to the output.
struct Params {
  const uint8_t* weight;        // packed blocks [ceil(n / 64)][k / 128]
  const uint8_t* residual;      // nested: the blocks of the second plane
  const int32_t* use_residual;  // nested: 0 there leaves the second plane out; may be null
  const float* x_scale;
  const int32_t* x_row_sum;
  const float* channel_scale;
  const float* channel_zero;  // null where the weight has groups
  const void* bias;
  void* out;
  int32_t* workspace;
  int m, n, k_blocks, weight_blocks;
  int tail_tokens;  // Hopper: tokens that a copy of x brings for the last tiles along m
  Bias bias_type;
  Output out_type;
  // The work, in steps of k, each of which is a stage. tiles_n counts kClusterTiles neighbours as
  // one. Where split > 0, every tile is done by so many clusters, each a part of k. Otherwise tiles
  // below `whole_tiles` are done by one cluster each, and the steps of the others are one row, cut
  // into pieces of `piece` steps.
  int tiles_m, tiles_n, steps, split, whole_tiles, piece;
  int stages;       // portable: of the ring, as many as the card's shared memory has room for
  const int8_t* x;  // [m, k]; Hopper has a tensor map of it
};

// The same for a mixture of experts, whose weights, channel_scale, channel_zero and bias lie one
// expert after the other. Rows of x are in the order of experts, and each expert's first one begins
// a tile. How many tiles there are, and whose, is known on the device alone: the host launches for
// max_tiles.
// vllm_qoq/ops/expert_ops.py lays the rows out, in tiles of one of these numbers of tokens.
inline constexpr int kExpertTiles[] = {16, 64, 128};
struct ExpertParams : Params {
  const int32_t* tiles;        // [1], along m
  const int32_t* tile_expert;  // [max_tiles]
  int max_tiles;
};

}  // namespace qoq::w4a8
