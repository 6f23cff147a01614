// What the tiles of the portable path take, from what a GPU says of itself. The shares of its rates
// and the constants are what fits one H200; it decides between tiles, and for nothing else.
#pragma once

#include <algorithm>

#include "common/card.h"
#include "gemm/portable/tiles.h"
#include "gemm/w4a8_schedule.h"

namespace qoq::w4a8::portable {

// Operations of int8 mma a clock and multiprocessor: the data sheets', but on 9.0, whose own
// instructions the portable path does not use, what was measured (`bench gemm`), and on 10.0, for
// the same reason, a guess. 10.3 has hardly any.
inline int operations_of_clock(int capability) {
  switch (capability) {
    case 80:
    case 100:
      return 4096;
    case 90:
      return 4900;
    case 103:
      return 550;
    default:
      return 2048;
  }
}

// How many stages of a tile a block has where the intended number of blocks share a
// multiprocessor; below Tile::kMinStages the tile cannot run there.
template <class Tile, Weights kWeights>
int stages_on(const Card& card) {
  constexpr int kReserved = 1024;  // which the system takes for each block
  const int bytes =
      std::min(card.shared_bytes, card.multiprocessor_shared_bytes / Tile::kResident - kReserved);
  const int room = bytes - Tile::template shared_bytes<kWeights>(0);
  return std::min(Tile::kMaxStages, room / Tile::template kStageBytes<kWeights>);
}

template <class Tile, Weights kWeights>
Cost cost_on(const Card& card) {
  constexpr float kOfPeak = 0.65f, kOfBandwidth = 0.88f;
  constexpr float kCacheBytesOfClock = 32;  // from the L2, by a multiprocessor
  constexpr float kAddedOfClock = 2;        // sums in the L2, by a multiprocessor
  constexpr float kStep = 120, kOutput = 500, kSum = 2000;
  // Nanoseconds are clocks by GHz. A multiprocessor does the steps of kResident blocks at a time.
  const float each = Tile::kResident / card.clock;
  const float operations = 2.f * Tile::kChannels * Tile::kTokens * kBlockK;
  const float weights = Tile::kBlocks * Tile::template kWeightBytes<kWeights>;
  const float output = 2.f * Tile::kChannels * Tile::kTokens;
  float step = std::max(operations / (operations_of_clock(card.capability) * kOfPeak),
                        Tile::template kStageBytes<kWeights> / kCacheBytesOfClock) *
               each;
  // Bytes by GB/s are nanoseconds, too.
  if (card.bandwidth > 0)
    step = std::max(
        step, weights * Tile::kResident * card.multiprocessors / (card.bandwidth * kOfBandwidth));
  return {static_cast<int>(step + kStep),
          static_cast<int>(output / kCacheBytesOfClock * each + kOutput),
          static_cast<int>(Tile::kTileInts / kAddedOfClock * each + kSum)};
}

}  // namespace qoq::w4a8::portable
