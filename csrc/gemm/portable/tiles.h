// The tiles of the portable path, and where their shared memory goes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gemm/w4a8_config.h"

namespace qoq::w4a8::portable {

// Eight warps multiply. Of few tokens another one loads for them, and of more, whose registers leave
// no room for it, all of them do. Four neighbours divide the channels of the tile.
//
// kBlocks       blocks of 64 channels; each warp has 16 channels for each, side by side
// kTokenWarps   warps that divide the tokens
// kInputWarps   warps that divide a step: 2 where a tile of few tokens would leave warps idle.
//               They add up over shared memory.
// kWarpTokens   tokens of a warp
// kResident     blocks of threads that an SM holds at once
// kStepBlocks   k_blocks of a step. Few tokens need more, since waiting costs what it costs; warps
//               that divide a step then have a k_block each
// kLoadWarps    warps beside those that multiply: 1 or 0
template <int kBlocks_, int kTokenWarps_, int kInputWarps_, int kWarpTokens_, int kResident_,
          int kStepBlocks_, int kLoadWarps_>
struct Tile {
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kTokenWarps = kTokenWarps_;
  static constexpr int kInputWarps = kInputWarps_;
  static constexpr int kWarpTokens = kWarpTokens_;
  static constexpr int kResident = kResident_;
  static constexpr int kStepBlocks = kStepBlocks_;
  static constexpr int kLoadWarps = kLoadWarps_;
  static constexpr int kChannelWarps = 4;
  static constexpr int kThreads = 32 * kChannelWarps * kTokenWarps * kInputWarps;
  static constexpr int kBlockThreads = kThreads + 32 * kLoadWarps;
  static constexpr int kLoadThreads = kLoadWarps == 0 ? kThreads : 32 * kLoadWarps;
  static constexpr int kChannels = kBlocks * kBlockN;
  static constexpr int kTokens = kTokenWarps * kWarpTokens;
  static_assert(kThreads == 256 && kTokens <= kThreads && kChannels <= kThreads);
  static_assert(kWarpTokens == 8 || kWarpTokens % 16 == 0);
  static_assert(kInputWarps <= 2 && (kStepBlocks == 1 || kStepBlocks == kInputWarps));

  // For `WorkList` and `schedule`: a block is a cluster, and a stage is a step.
  static constexpr bool kByInputs = false;
  static constexpr int kCluster = 1, kClusterTiles = 1;
  static constexpr int kBand = 8;  // tiles along tokens whose x stays in the L2

  // A warp has slabs of 16 channels and octets of tokens, and for each pair four sums in every
  // lane. Warps that divide k each write a part of the octets, or the first of them the only one.
  static constexpr int kSlabs = kBlocks;
  static constexpr int kOctets = kWarpTokens / 8;
  static constexpr int kOutOctets = std::max(1, kOctets / kInputWarps);
  static constexpr int kTileInts = kSlabs * kOutOctets * 4 * kThreads;
  static_assert(kResident * kTileInts <= kMaxTileInts);
  // Whether the constants of the epilogue are fetched before the sums are made: as long as a thread
  // has registers left beside its sums.
  static constexpr int kSums = kSlabs * kOctets * 4;
  static constexpr bool kFetchesEarly = kSums < (kResident == 2 ? 32 : 128);

  // Shared memory, from an address that is a multiple of 128:
  //   [constants of the epilogue, a flag][barriers][a buffer for the output of each warp]
  //   [sums that warps exchange][ring]
  // A stage of the ring is, for each of its k_blocks, x, then for each block of channels its weights
  // and what a nested one has besides.
  static constexpr int kMinStages = 2, kMaxStages = 8;
  static constexpr int kFlag = kChannels * 12 + kTokens * 8;
  static constexpr int kBarriers = kFlag + 16;
  static constexpr int kOutput = kBarriers + kMaxStages * 16;
  // 16 bytes more than a row has, so that rows begin in different banks.
  static constexpr int kOutputRowBytes = kSlabs * 16 * 2 + 16;
  static constexpr int kOutputBytes = 8 * kOutputRowBytes;  // of a warp
  static constexpr int kExchange = kOutput + kThreads / 32 * kOutputBytes;
  static constexpr int kExchangeBytes = kInputWarps == 2 ? kThreads * kSlabs * 16 : 0;
  static constexpr int kRing = (kExchange + kExchangeBytes + 127) / 128 * 128;
  static constexpr int kXBytes = kTokens * kBlockK;
  template <Weights kWeights>
  static constexpr int kWeightBytes = kBlockBytes<kWeights> + kResidualBytes<kWeights>;
  template <Weights kWeights>
  static constexpr int kPartBytes = kXBytes + kBlocks * kWeightBytes<kWeights>;
  template <Weights kWeights>
  static constexpr int kStageBytes = kStepBlocks * kPartBytes<kWeights>;
  template <Weights kWeights>
  static constexpr int shared_bytes(int stages) {
    return 128 + kRing + stages * kStageBytes<kWeights>;
  }
};

// clang-format off
//                      blocks
//                      |  token warps
//                      |  |  input warps
//                      |  |  |   tokens of a warp
//                      |  |  |   |  resident
//                      |  |  |   |  |  k_blocks of a step
//                      |  |  |   |  |  |  warps that load
using Tile8      = Tile<1, 1, 2,  8, 2, 2, 1>;
using Tile16     = Tile<1, 1, 2, 16, 2, 2, 1>;
using Tile32     = Tile<1, 1, 2, 32, 2, 2, 1>;
using Tile64     = Tile<1, 1, 2, 64, 2, 1, 0>;
using Tile64Wide = Tile<2, 1, 2, 64, 1, 1, 0>;
using Tile128    = Tile<2, 2, 1, 64, 1, 1, 0>;
using Tile256    = Tile<4, 2, 1, 64, 1, 1, 0>;
// clang-format on

}  // namespace qoq::w4a8::portable
