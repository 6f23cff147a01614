// The numbers of the decode attention: tiles, shared memory, parameters.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kv/page.h"

namespace qoq::kv {

constexpr int kTileTokens = 32;  // a warp's step: two times 16 rows of K
constexpr int kTileSteps = kTileTokens / 16;
constexpr int kMostCopies = 8;   // copies that bring a tile: four parts of two pages
constexpr int kHeadsOfTile = 8;  // query heads: the n of the mma, or half of its m
// Warps of a block: as many as its shared memory has room for.
constexpr int kMostWarps = 8;
constexpr int kFewestWarps = 4;
// For several new tokens, where shared memory has room. With two head tiles a multiprocessor holds
// one block; what a warp computes of a tile of 4-bit codes takes longer than its bytes, and three
// warps of a scheduler hide more of it than two.
constexpr int kWideWarps = 12;
// A small block table is fetched into the L2 beforehand; rows of a large one are mostly unused.
constexpr int kLineInts = 32;
constexpr int kMostLines = 1024;

// vllm_qoq/ops/kv_ops.py makes the workspace with these numbers and with the largest kResident.
constexpr int kMaxGroup = 16;     // query heads of a KV head
constexpr int kMaxQueryLen = 8;   // new tokens of a sequence
constexpr int kMaxBlocks = 1024;  // and as many counters at the beginning of the workspace
// Partial sums carry their two numbers, the maximum and the sum of weights, behind the channels.
constexpr int kPartialPadding = 4;

// A thread's share of a row of K, or of a pair's row of V.
//
// Codes are given to the mma as they are: v in the lowest bits of an fp16 is the subnormal number
// v * 2^-24, which the matrix units know, and a nibble four bits higher is v * 2^-20.
template <int kHeadSize, int kBits>
struct Operand : Codes<kHeadSize, kBits> {
  using Base = Codes<kHeadSize, kBits>;
  static constexpr int kWords = Base::kRow / 16;                   // of 32 bits
  static constexpr int kWordMultiplies = kHeadSize / 16 / kWords;  // k16 of a word
  static constexpr int kPieceBytes = kWords % 4 == 0 ? 16 : kWords % 2 == 0 ? 8 : 4;  // of one load
  // What a thread has of a pair's row of V are runs, which a rotation by 32 bytes leaves in one
  // piece, and the runs of the 8 threads alternate.
  static constexpr int kRunBytes = kWords % 4 == 0 ? (kWords < 8 ? 4 * kWords : 32) : kPieceBytes;
  static constexpr int kRuns = 4 * kWords / kRunBytes;
  static constexpr int kRunChannels = kRunBytes * 4 / kBits;
  static constexpr float kLowUnit = 1.f / (1 << 24);
  static constexpr float kHighUnit = kBits == 4 ? 16 * kLowUnit : kLowUnit;
};

// Whether more query heads of a KV head than a head tile has are taken as those of two KV heads
// with the same pages: two head tiles have no room in registers at 256 channels, and few models ask
// for them at 96.
__host__ __device__ constexpr bool has_one_tile(int head_size) {
  return head_size == 96 || head_size == 256;
}

// How the query heads of a KV head, for each of the new tokens, are divided: into 2^shift parts of
// at most `count` columns, each of which reads the pages.
struct Columns {
  int count, shift;
};

constexpr Columns columns_of(int64_t head_size, int64_t group, int64_t query_len) {
  const int most = has_one_tile(static_cast<int>(head_size)) ? kHeadsOfTile : 2 * kHeadsOfTile;
  const int all = static_cast<int>(group * query_len);
  Columns columns{all, 0};
  while (columns.count > most) columns.count = divide_up(all, 1 << ++columns.shift);
  return columns;
}

// The numbers that follow from a page, how many query heads share a KV head, the warps of a
// block, and whether a sequence may have more than one new token.
template <class PageValue, int kHeadTilesValue, int kWarpsValue, bool kHasManyQueriesValue>
struct Attention : PageValue {
  using Base = PageValue;
  using K = Operand<Base::kHeadSize, Base::K::kBits>;
  using V = Operand<Base::kHeadSize, Base::V::kBits>;
  static constexpr int kHeadTiles = kHeadTilesValue;  // of kHeadsOfTile query heads each
  static constexpr bool kHasManyQueries = kHasManyQueriesValue;
  static constexpr int kWarps = kWarpsValue;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kResident =
      K::kBits == 4 && kHeadTiles == 1 && Base::kHeadSize <= 128 ? 2 : 1;
  static constexpr int kStages = Base::kHeadSize == 64 ? 4 : 2;  // of a warp's ring
  static constexpr int kStageBytes = kTileTokens * Base::kTokenBytes;
  static constexpr int kWarpTilesBytes = kStages * kStageBytes;
  static constexpr int kWarpRingBytes = kWarpTilesBytes + kStages * 8;  // and barriers
  static constexpr int kRingBytes = kWarps * kWarpRingBytes;

  static constexpr int kMultiplies = Base::kHeadSize / 16;  // m16n8k16 over all channels
  static constexpr int kChannels = Base::kHeadSize / 8;     // of a thread, in the output
  // When adding up, a warp takes a slice of a head, and a thread kVector channels of it.
  static constexpr int kVector = Base::kHeadSize == 64 ? 2 : 4;
  static constexpr int kSlice = Base::kHeadSize < 32 * kVector ? Base::kHeadSize : 32 * kVector;
  static constexpr int kSlices = Base::kHeadSize / kSlice;
  static constexpr int kPartial = Base::kHeadSize + kPartialPadding;  // floats of a query head

  // The largest |q| becomes 2^kQueryExponent or up to twice as much, and 16 times that in channels
  // that meet low nibbles. Everything stays below 2^16.
  static constexpr int kQueryExponent = K::kBits == 4 ? 10 : 14;
  // exp2(score - maximum) is at most 2^kWeightExponent. Times the largest scale, 2 * 65504 /
  // levels, it stays below 65504, and small weights keep more bits.
  static constexpr int kWeightExponent = V::kBits == 4 ? 2 : 6;

  // Once it is done, a warp's ring holds what it has of its last segment.
  static_assert(kWarpTilesBytes >= kMaxGroup * kPartial * 4 && kWarpRingBytes % 16 == 0);
  static constexpr int kSharesBytes = kHasManyQueries ? kWarps * 52 + 80 : kWarps * 44 + 64;

  static constexpr int shared_bytes(int group) {
    return 128 + kRingBytes + kSharesBytes + kWarps * group * kPartial * 4;
  }
};

// A copy of a part of a tile into shared memory, from a token of the tile on: its offset in the
// page, `source`, and that of each further token, `step`; where it goes in the stage; its bytes. A
// warp has one in each lane all the time, so that small numbers share a register.
class Copy {
 public:
  Copy() = default;
  Copy(int token, int source, int step, int destination, int bytes)
      : source_(source),
        token_and_step_(static_cast<uint32_t>(token | step << 16)),
        destination_and_bytes_(static_cast<uint32_t>(destination) | static_cast<uint32_t>(bytes)
                                                                        << 16) {}

  __host__ __device__ int source() const { return source_; }
  __host__ __device__ int token() const { return token_and_step_ & 0xFFFF; }
  __host__ __device__ int step() const { return token_and_step_ >> 16; }
  __host__ __device__ int destination() const { return destination_and_bytes_ & 0xFFFF; }
  __host__ __device__ int bytes() const { return destination_and_bytes_ >> 16; }

 private:
  int source_ = 0;
  uint32_t token_and_step_ = 0, destination_and_bytes_ = 0;
};

struct Params {
  const void* q;  // [new tokens, query heads, head size], bfloat16 or float16
  const uint8_t* cache;
  const int32_t* block_table;
  const int32_t* seq_lens;
  void* out;
  int32_t* counters;
  float* partials;  // [blocks, 2, group, kPartial]
  // In elements; those of the cache, block_stride and head_stride, in bytes.
  int64_t q_stride, q_head_stride, out_stride, out_head_stride;
  int64_t block_stride;
  int head_stride;
  int64_t table_stride;
  int sequences, kv_heads, group;
  int head_shift;               // so many times two KV heads in a row are one of the cache
  int resident;                 // blocks of the launch that a multiprocessor holds
  int row_lines;                // of the block table, if it is fetched beforehand; otherwise 0
  int page_tokens, max_tokens;  // of a sequence: what the block table has room for
  uint32_t inverse_page;        // 2^31 / (page_tokens / 16), rounded up
  uint32_t inverse_blocks;      // 2^32 / the blocks of the launch, rounded up
  int window;                   // how many of the last tokens are seen; 0 for all
  float scale_log2;             // softmax scale * log2(e), and what a rotation leaves out
  float cap_log2;               // of a score, like it in units of log2; 0 for none
  float cap_exponent;           // 2 / the cap, for e^(2 score / cap) as a power of 2
  const void* sinks;            // [query heads], scores beside those of the tokens, or null
  bool is_bfloat16, is_rotated;
  // How a tile lies in shared memory: as whole pages, or as if pages had 32 tokens.
  int unit_tokens, unit_bytes;
  Copy copies[kMostCopies];
  int copy_count;
  int v_offset, k_scale_offset, v_scale_offset, step_bytes, scale_step_bytes;
  int v_step_bytes;  // where rows of V are not as long as those of K; else step_bytes is of both
  // Where sequences have more than one new token each, `group` counts columns (`column_of`).
  const int32_t* query_start;  // [sequences + 1]: sequence i has rows [i] to [i + 1] of q and out
  int rows, query_len;         // of q; the most of them that a sequence has
  int heads_of_kv;             // query heads of a KV head of the cache
  uint32_t inverse_heads;      // 2^16 / heads_of_kv, rounded up
};

// The blocks that a multiprocessor gets. It is one where the block table has no room for more than
// a few tiles for each warp: blocks without work would hold up the end of the kernel, and more
// parts are more to add up.
template <class A>
int blocks_of_processor(const Params& p, int processors) {
  constexpr int kFewTiles = 4;
  const int64_t tiles = int64_t{p.sequences} * p.kv_heads * divide_up(p.max_tokens, kTileTokens);
  return tiles <= kFewTiles * A::kWarps * processors ? 1 : A::kResident;
}

// Fills in what follows from `page_tokens`, `max_tokens` and the blocks of the launch.
template <class A>
void lay_out(Params& p, int blocks, int resident) {
  p.resident = resident;
  const int row_lines = divide_up(p.max_tokens / p.page_tokens, kLineInts);
  p.row_lines = int64_t{p.sequences} * row_lines <= kMostLines ? row_lines : 0;
  p.inverse_blocks = static_cast<uint32_t>(((uint64_t{1} << 32) + blocks - 1) / blocks);
  const int unit = p.page_tokens % kTileTokens == 0 ? kTileTokens : kTokenMultiple;
  // floor(n / d) is n * ceil(2^31 / d) >> 31 while n d < 2^31.
  const uint32_t d = p.page_tokens / kTokenMultiple;
  p.inverse_page = ((uint32_t{1} << 31) + d - 1) / d;
  p.unit_tokens = unit;
  p.unit_bytes = unit * A::kTokenBytes;
  p.v_offset = A::v_codes(unit, 0);
  p.k_scale_offset = A::k_scales(unit, 0);
  p.v_scale_offset = A::v_scales(unit, 0);
  const bool is_whole = unit == kTileTokens;
  p.step_bytes = is_whole ? kTokenMultiple * A::K::kRow : p.unit_bytes;
  p.v_step_bytes = is_whole ? kTokenMultiple * A::V::kRow : p.unit_bytes;
  p.scale_step_bytes = is_whole ? kTokenMultiple * kScaleBytes : p.unit_bytes;
  p.copy_count = 0;
  for (int token = 0; token < kTileTokens; token += unit) {
    const int to = token / unit * p.unit_bytes, page = p.page_tokens;
    if (unit == page) {
      p.copies[p.copy_count++] = Copy(token, 0, 0, to, p.unit_bytes);
      continue;
    }
    auto copy = [&](int source, int step, int destination) {
      p.copies[p.copy_count++] = Copy(token, source, step, to + destination, unit * step);
    };
    copy(0, A::K::kRow, 0);
    copy(A::v_codes(page, 0), A::V::kRow, p.v_offset);
    copy(A::k_scales(page, 0), kScaleBytes, p.k_scale_offset);
    copy(A::v_scales(page, 0), kScaleBytes, p.v_scale_offset);
  }
}

}  // namespace qoq::kv
