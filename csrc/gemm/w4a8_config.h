// The numbers of the W4A8 GEMM: what the packed weight looks like, and which tiles there are.
#pragma once

#include <algorithm>
#include <cstdint>

namespace qoq::w4a8 {

// One wgmma multiplies 64 output channels. 128 inputs are a k_block: a group of the weights, and
// one row of the copy engine's 128-byte swizzle.
inline constexpr int kBlockN = 64;
inline constexpr int kBlockK = 128;

// Up to kMaxK inputs the sums are exact: 255 * 128 * K < 2^31. kMaxRows limits tokens and channels.
inline constexpr int kMaxK = 1 << 16;
inline constexpr int kMaxRows = 1 << 24;

// A packed block is 64 channels x 128 inputs (`vllm_qoq.ops.w4a8_layout` makes it):
//   codes   [2 halves of k][128 threads][16 bytes]   what one thread's registers hold
//   params  [32 pairs of rows][scale, offset + 128 of row r, the same of row r + 8]
// `params` is there only with groups. A nested weight has a second plane of blocks, which are
// `codes` alone: what the weight's 8 bits have more than its 4, plus kResidualZero.
inline constexpr int kCodeBytes = kBlockN * kBlockK / 2;
inline constexpr int kParamBytes = kBlockN * 2;
enum class Weights { kChannel, kGrouped, kNested };
inline constexpr int kResidualZero = 8;
template <Weights kWeights>
inline constexpr bool kHasGroups = kWeights != Weights::kChannel;
template <Weights kWeights>
inline constexpr int kBlockBytes = kCodeBytes + (kHasGroups<kWeights> ? kParamBytes : 0);
template <Weights kWeights>
inline constexpr int kResidualBytes = kWeights == Weights::kNested ? kCodeBytes : 0;

// The workspace is int32: counters, then sums of the tiles that several blocks share. The kernel
// finds it zero and leaves it zero. At most as many tiles are shared as blocks run at a time.
// vllm_qoq/ops/linear_ops.py makes it with the same numbers.
inline constexpr int kCounters = 1024;
inline constexpr int kMaxTileInts = 256 * 128;  // for each multiprocessor

// What the warpgroups of a block of threads divide among them.
enum class Divide { kChannels, kInputs };

// kDivide        By channels, each warpgroup has kWeightBlocks blocks of 64 channels of its own. By
//                inputs, all have the same 64 channels and each every kGroups-th k_block; they add
//                up over shared memory, and a block of threads does one piece of work and ends.
// kGroups        warpgroups that multiply; one more loads
// kWeightBlocks  blocks of 64 channels that a warpgroup has
// kTokens        tokens of a tile: the n of wgmma
// kStages        stages in flight
// kResident      blocks of threads that an SM holds at once. Two let the next kernel of the stream
//                fetch its weights while this one ends.
// kCluster       blocks of a cluster. By channels, they have the same tokens, of which each fetches
//                a part for all. By inputs, they divide k further.
// kUnit          tokens of a unit in which the output leaves
template <Divide kDivide, int kGroups_, int kWeightBlocks_, int kTokens_, int kStages_,
          int kResident_, int kCluster_ = 1, int kUnit = 64>
struct Tile {
  static constexpr bool kByInputs = kDivide == Divide::kInputs;
  static constexpr int kGroups = kGroups_;
  static constexpr int kWeightBlocks = kWeightBlocks_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kStages = kStages_;
  static constexpr int kResident = kResident_;
  static constexpr int kCluster = kCluster_;
  static_assert(!kByInputs || kWeightBlocks == 1);

  static constexpr int kConsumers = kGroups * 128;
  static constexpr int kThreads = kConsumers + 128;

  // The registers of a thread. At the start all threads have the same share of 64 Ki; those that
  // load give most of theirs to those that multiply.
  static constexpr int kSharedRegisters = 65536 / (kResident * kThreads) / 8 * 8;
  static constexpr int kLoadRegisters = 48;
  static constexpr int kMultiplyRegisters =
      ((kGroups + 1) * kSharedRegisters - kLoadRegisters) / kGroups / 8 * 8;
  static_assert(kMultiplyRegisters <= 255);

  static constexpr int kBlocks = kGroups * kWeightBlocks;  // of weights, in a stage
  // One thread in each of up to four warps loads: one brings x, the others the weights.
  static constexpr int kWeightLoaders = kByInputs ? 1 : kBlocks % 3 == 0 ? 3 : 2;

  static constexpr int kStepBlocks = kByInputs ? kGroups : 1;     // k_blocks of a stage
  static constexpr int kClusterTiles = kByInputs ? 1 : kCluster;  // neighbours in channels
  static constexpr int kChannels = kByInputs ? kBlockN : kBlocks * kBlockN;
  static constexpr int kAccumulators = kTokens / 2;  // registers per block of 64 channels

  // A warpgroup's part of the output: all tokens of its channels, or a part of the tokens.
  static constexpr int kOutTokens =
      kByInputs ? std::max(8, kTokens / (kGroups * kCluster)) : kTokens;
  static constexpr int kOutAccumulators = kOutTokens / 2;
  static constexpr int kTileInts = kWeightBlocks * kOutAccumulators * kConsumers;
  static_assert(kResident * kTileInts <= kMaxTileInts);

  // Shared memory, from an address that is a multiple of 1024:
  //   [x of all stages][output][weights of all stages][constants of the epilogue][barriers]
  static constexpr int kXBlockBytes = kTokens * kBlockK;
  static constexpr int kXBytes = kStepBlocks * kXBlockBytes;
  // The output leaves in units of 64 channels x kUnitTokens, from two buffers in turn.
  static constexpr int kUnitTokens = std::min(kOutTokens, kUnit);
  static constexpr int kUnits = kWeightBlocks * kOutTokens / kUnitTokens;
  static constexpr int kOutputBuffers = kUnits > 1 ? 2 : 1;
  static constexpr int kUnitBytes = kUnitTokens * kBlockN * 2;
  static constexpr int kOutputBytes = kGroups * kOutputBuffers * kUnitBytes;
  static constexpr int kConstantBytes = kChannels * 12 + kTokens * 8;
  static constexpr int kBarrierBytes = 2 * kStages * 8 + 16;
  template <Weights kWeights>
  static constexpr int kWeightBytes = kBlocks * (kBlockBytes<kWeights> + kResidualBytes<kWeights>);
  template <Weights kWeights>
  static constexpr int kStageBytes = kXBytes + kWeightBytes<kWeights>;
  template <Weights kWeights>
  static constexpr int kSharedBytes =
      1024 + kStages * kStageBytes<kWeights> + kOutputBytes + kConstantBytes + kBarrierBytes;
  // An SM has 228 KiB, of which the system takes 1 KiB for each block.
  template <Weights kWeights>
  static constexpr bool kFits = kResident * (kSharedBytes<kWeights> + 1024) <= 228 * 1024;

  static_assert(kTokens % 8 == 0 && kTokens <= 256 && kTokens <= kConsumers);
  static_assert(kXBlockBytes / kClusterTiles % 1024 == 0);
  static_assert(kOutTokens % kUnitTokens == 0 && kUnitBytes % 1024 == 0);
  // Sums that warpgroups add up lie where the ring was.
  static_assert(!kByInputs ||
                kConsumers * kAccumulators * 4 <= kStages * kStageBytes<Weights::kChannel>);
};

// clang-format off
//                                             groups
//                                             |  weight blocks
//                                             |  |  tokens
//                                             |  |  |    stages
//                                             |  |  |    |   resident
//                                             |  |  |    |   |  cluster
//                                             |  |  |    |   |  |  unit
// By channels, for any number of them.
using Tile8         = Tile<Divide::kChannels,  2, 1,   8, 10, 2>;
using Tile16        = Tile<Divide::kChannels,  2, 1,  16, 10, 2>;
using Tile32        = Tile<Divide::kChannels,  2, 1,  32,  8, 2>;
using Tile64        = Tile<Divide::kChannels,  2, 1,  64,  5, 2>;
using Tile128       = Tile<Divide::kChannels,  2, 1, 128,  6, 1>;
using Tile128Wide   = Tile<Divide::kChannels,  2, 2, 128,  5, 1, 2>;
using Tile192       = Tile<Divide::kChannels,  3, 1, 128,  6, 1>;
using Tile256       = Tile<Divide::kChannels,  2, 1, 256,  4, 1, 2>;
// By inputs, for few channels: fewer sums leave a multiprocessor.
using Inputs64      = Tile<Divide::kInputs,    2, 1,  64,  4, 2>;
using Inputs64Deep  = Tile<Divide::kInputs,    4, 1,  64,  4, 1>;
using Inputs128     = Tile<Divide::kInputs,    2, 1, 128,  4, 1>;
using Inputs128Pair = Tile<Divide::kInputs,    2, 1, 128,  4, 1, 2>;
// For nested weights, whose stages are longer.
using Nested16      = Tile<Divide::kChannels,  2, 1,  16,  5, 2>;
using Nested64      = Tile<Divide::kChannels,  2, 1,  64,  3, 2>;
using Nested128     = Tile<Divide::kChannels,  2, 1, 128,  5, 1>;
using Nested192     = Tile<Divide::kChannels,  3, 1, 128,  4, 1>;
using Nested256     = Tile<Divide::kChannels,  2, 1, 256,  4, 1, 2, 32>;
// clang-format on

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
  int tail_tokens;  // tokens that a copy of x brings for the last tiles along m
  Bias bias_type;
  Output out_type;
  // The work, in steps of k, each of which is a stage. tiles_n counts kClusterTiles neighbours as
  // one. Where split > 0, every tile is done by so many clusters, each a part of k. Otherwise tiles
  // below `whole_tiles` are done by one cluster each, and the steps of the others are one row, cut
  // into pieces of `piece` steps.
  int tiles_m, tiles_n, steps, split, whole_tiles, piece;
};

}  // namespace qoq::w4a8
