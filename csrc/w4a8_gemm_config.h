// Numbers of the W4A8 GEMM: what the packed weight looks like and which tile runs when.
#pragma once

#include <cstdint>

namespace qoq::w4a8 {

// One wgmma multiplies 64 output channels; a stage of the pipeline is 128 inputs, which is a
// group of the weights and one row of the copy engine's 128-byte swizzle.
inline constexpr int kBlockN = 64;
inline constexpr int kBlockK = 128;

// A packed block is 64 channels x 128 inputs (`vllm_qoq.w4a8_layout` makes it):
//   codes   [2 halves of k][128 threads][16 bytes]   what one thread's registers hold
//   params  [32 pairs of rows][scale, offset + 128 of row r, the same of row r + 8]
// `params` is there only with groups.
inline constexpr int kCodeBytes = kBlockN * kBlockK / 2;
inline constexpr int kParamBytes = kBlockN * 2;
template <bool kGrouped>
inline constexpr int kBlockBytes = kCodeBytes + (kGrouped ? kParamBytes : 0);

inline constexpr int kConsumerGroups = 2;  // warpgroups that multiply
inline constexpr int kConsumers = kConsumerGroups * 128;
inline constexpr int kThreads = kConsumers + 128;  // and one that loads, of which one thread works

// kWeightBlocks  blocks of 64 channels that one warpgroup multiplies
// kTokens        tokens of a tile: the n of wgmma
// kStages        stages in flight
// kResident      blocks of threads an SM holds at once. Two let the next kernel of the stream
//                fetch its weights while this one ends.
// kShare         blocks of a cluster that share the tokens: each fetches a part for all
template <int kWeightBlocks_, int kTokens_, int kStages_, int kResident_, int kShare_ = 1>
struct Tile {
  static constexpr int kWeightBlocks = kWeightBlocks_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kStages = kStages_;
  static constexpr int kResident = kResident_;
  static constexpr int kShare = kShare_;

  // Registers a thread. At the start all have the same share of 64 Ki; those who load give most of
  // theirs to those who multiply.
  static constexpr int kSharedRegisters = 65536 / (kResident * kThreads) / 8 * 8;
  static constexpr int kLoadRegisters = kResident == 1 ? 40 : 32;
  static constexpr int kMultiplyRegisters = (3 * kSharedRegisters - kLoadRegisters) / 16 * 8;
  static_assert(kConsumerGroups == 2 && kMultiplyRegisters <= 255);

  static constexpr int kBlocks = kConsumerGroups * kWeightBlocks;
  static constexpr int kChannels = kBlocks * kBlockN;
  static constexpr int kGroupChannels = kWeightBlocks * kBlockN;
  static constexpr int kAccumulators = kTokens / 2;  // registers per block of 64 channels
  static constexpr int kTileInts = kChannels * kTokens;

  // Shared memory, from an address that is a multiple of 1024:
  // [x of all stages][weights of all stages][output rows][epilogue constants][barriers]
  static constexpr int kXBytes = kTokens * kBlockK;
  static constexpr int kChunk = kTokens < 16 ? kTokens : 16;  // tokens written at a time
  static constexpr int kRowBytes = kGroupChannels * 2 + 16;   // 16: no bank conflicts
  static constexpr int kOutputBytes = kConsumerGroups * kChunk * kRowBytes;
  static constexpr int kConstantBytes = kChannels * 12 + kTokens * 8;
  static constexpr int kBarrierBytes = 2 * kStages * 8 + 16;
  // Sums that a cluster adds up lie where the ring was. 4: no bank conflicts.
  static constexpr int kSumPitch = kChannels + 4;
  template <bool kGrouped>
  static constexpr int kWeightBytes = kBlocks * kBlockBytes<kGrouped>;
  template <bool kGrouped>
  static constexpr int kSharedBytes =
      1024 + kStages * (kXBytes + kWeightBytes<kGrouped>)+kOutputBytes + kConstantBytes +
      kBarrierBytes;

  static_assert(kTokens % 8 == 0 && kTokens <= 256 && kXBytes % 1024 == 0);
  static_assert(kXBytes / kShare % 1024 == 0);
  static_assert(kTokens * kSumPitch * 4 <= kStages * (kXBytes + kWeightBytes<false>));
  static_assert(kTokens % kChunk == 0 && kChunk % 8 == 0);
  // 228 KiB an SM, of which the system takes 1 KiB a block.
  static_assert(kResident * (kSharedBytes<true> + 1024) <= 228 * 1024);
};

//                    blocks tokens stages resident share
using Tile8 = Tile<1, 8, 10, 2>;
using Tile16 = Tile<1, 16, 10, 2>;
using Tile32 = Tile<1, 32, 8, 2>;
using Tile64 = Tile<1, 64, 6, 2, 2>;
using Tile128 = Tile<1, 128, 7, 1, 2>;
using TileLarge = Tile<2, 128, 5, 1, 2>;

// Clocks of a k_block: of the tensor cores 512 and 1024, but the L2 delivers about 26 bytes a clock
// to each multiprocessor, and the small tile needs 16.6 KB. Estimates, to be measured.
inline constexpr int kClocks128 = 650, kClocksLarge = 1050;

inline constexpr int kMaxCluster = 8;  // the largest cluster that every Hopper can run

// The workspace is int32: counters, then sums of the tiles that several blocks share. The kernel
// finds it zero and leaves it zero.
inline constexpr int kCounters = 1024;
inline constexpr int kMaxTileInts = TileLarge::kTileInts;
static_assert(Tile128::kTileInts <= kMaxTileInts && 2 * Tile64::kTileInts <= kMaxTileInts);

enum class Output : int { kBfloat16, kFloat16 };
enum class Bias : int { kNone, kFloat32, kBfloat16, kFloat16 };

// What the kernel computes, for tokens < m and channels < n:
//   out[token, channel] = x_scale (acc channel_scale - x_row_sum channel_zero) + bias
// `acc` is exact; float32 follows it in this order, rounded once to the output.
struct Params {
  const uint8_t* weight;  // packed blocks [ceil(n / 64)][k / 128]
  const float* x_scale;
  const int32_t* x_row_sum;
  const float* channel_scale;
  const float* channel_zero;  // without groups
  const void* bias;
  void* out;
  int32_t* workspace;
  int m, n, k_blocks, weight_blocks;
  Bias bias_type;
  Output out_type;
  // The work. tiles_n counts kShare neighbours as one. split > 1: a tile is done by so many times
  // kShare blocks, each a part of k. Else tiles below `whole_tiles` are done by kShare blocks,
  // and the k_blocks of the others are one row, cut into pieces of `piece` units.
  int tiles_m, tiles_n, split, whole_tiles, piece;
};

}  // namespace qoq::w4a8
