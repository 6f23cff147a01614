// The tiles of the Hopper path, and where their shared memory goes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gemm/w4a8_config.h"

namespace qoq::w4a8 {

// What the warpgroups of a block of threads divide among them.
enum class Divide { kChannels, kInputs };

// kDivide        By channels, each warpgroup has kWeightBlocks blocks of 64 channels of its own. By
//                inputs, all have the same 64 channels and each every kGroups-th k_block; they add
//                up over shared memory, and a block of threads does one piece of work and ends.
// kGroups        warpgroups that multiply; one more loads
// kWeightBlocks  blocks of 64 channels that a warpgroup has
// kTokens        tokens of a tile: the n of wgmma
// kStages        stages in flight; one less of weights that have no room for so many
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
  static constexpr int kResident = kResident_;
  static constexpr int kCluster = kCluster_;
  static constexpr int kBand = 16;  // tiles along tokens whose x stays in the L2
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
  static constexpr int kBarrierBytes = 2 * kStages_ * 8 + 16;
  template <Weights kWeights>
  static constexpr int kWeightBytes = kBlocks * (kBlockBytes<kWeights> + kResidualBytes<kWeights>);
  template <Weights kWeights>
  static constexpr int kStageBytes = kXBytes + kWeightBytes<kWeights>;
  template <Weights kWeights>
  static constexpr int shared_bytes(int stages) {
    return 1024 + stages * kStageBytes<kWeights> + kOutputBytes + kConstantBytes + kBarrierBytes;
  }
  // An SM has 228 KiB, of which the system takes 1 KiB for each block.
  template <Weights kWeights>
  static constexpr bool fits(int stages) {
    return kResident * (shared_bytes<kWeights>(stages) + 1024) <= 228 * 1024;
  }
  template <Weights kWeights>
  static constexpr int kStages = fits<kWeights>(kStages_) ? kStages_ : kStages_ - 1;
  template <Weights kWeights>
  static constexpr bool kFits = fits<kWeights>(kStages<kWeights>);
  template <Weights kWeights>
  static constexpr int kSharedBytes = shared_bytes<kWeights>(kStages<kWeights>);

  static_assert(kTokens % 8 == 0 && kTokens <= 256 && kTokens <= kConsumers);
  static_assert(kXBlockBytes / kClusterTiles % 1024 == 0);
  static_assert(kOutTokens % kUnitTokens == 0 && kUnitBytes % 1024 == 0);
  // Sums that warpgroups add up lie where the ring was.
  static_assert(!kByInputs ||
                kConsumers * kAccumulators * 4 <= kStages_ * kStageBytes<Weights::kChannel>);
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

}  // namespace qoq::w4a8
