// Decides who computes what: the tiles of all sequences and KV heads, in a row, are cut into equal
// ranges, one for each warp.
#pragma once

#include "kv/decode_config.h"

namespace qoq::kv {

constexpr uint32_t kAllLanes = 0xFFFFFFFF;
constexpr float kLog2E = 1.44269504f;

// The new tokens of a sequence, the last of its tokens: one, which is row `sequence` of the query,
template <bool kHasMany>
struct NewTokens {
  static constexpr int count = 1;

  __device__ void read_tokens(const Params&, int) {}
  __device__ void take_tokens(const NewTokens&, int) {}
};

// or `count` from row `first_row` on.
template <>
struct NewTokens<true> {
  int first_row, count;

  __device__ void read_tokens(const Params& p, int sequence) {
    first_row = p.query_start[sequence];
    const int end = min(p.query_start[sequence + 1], p.rows);
    count = max(0, min(end - first_row, p.query_len));
  }

  // Takes those that `lane` has in `other`.
  __device__ void take_tokens(const NewTokens& other, int lane) {
    first_row = __shfl_sync(kAllLanes, other.first_row, lane);
    count = __shfl_sync(kAllLanes, other.count, lane);
  }
};

// The tiles of one KV head of one sequence. `begin` counts the tiles of all segments before it.
template <class A>
struct Segment : NewTokens<A::kHasManyQueries> {
  using NewTokens<A::kHasManyQueries>::count;
  int sequence, head, begin, tiles;
  int length;  // tokens [first_token, length) are seen

  // Goes to head 0 of a sequence.
  __device__ void read(const Params& p, int index) {
    this->read_tokens(p, index);
    place(p, index, count == 0 ? 0 : max(0, min(p.seq_lens[index], p.max_tokens)));
  }

  __device__ void place(const Params& p, int index, int tokens) {
    sequence = index;
    head = 0;
    length = tokens;
    tiles = divide_up(length, kTileTokens) - first_token(p) / kTileTokens;
  }

  __device__ int first_token(const Params& p) const {
    return p.window > 0 ? max(0, length - (count - 1) - p.window) : 0;
  }

  // The first token of a tile, which may lie before that of the segment.
  __device__ int token_of(const Params& p, int tile) const {
    return (first_token(p) / kTileTokens + tile - begin) * kTileTokens;
  }

  // Whether all of its tiles are in [from, to).
  __device__ bool is_in(int from, int to) const { return begin >= from && end() <= to; }

  // Goes to the next segment that has tiles, which there must be.
  __device__ void next(const Params& p) {
    begin += tiles;
    if (++head < p.kv_heads) return;
    do read(p, sequence + 1);
    while (tiles == 0);
  }

  __device__ int end() const { return begin + tiles; }
};

// The tiles [begin, end) of a block, of which every warp has `share`, but for the last that has
// any.
struct BlockRange {
  int begin, end, share;

  __device__ int begin_of(int warp) const { return min(end, begin + warp * share); }
};

// What column `column` of a segment's scores is of: a query head of all, and a new token of the
// sequence. There are `group` columns. With several new tokens, the heads of the first come first.
struct Column {
  int head, token;
  bool is_there;
};

template <class A>
__device__ inline Column column_of(const Params& p, const Segment<A>& segment, int column) {
  if constexpr (A::kHasManyQueries) {
    const int kv_head = segment.head >> p.head_shift;
    const int index = (segment.head - (kv_head << p.head_shift)) * p.group + column;
    const int token = static_cast<int>(index * p.inverse_heads >> 16);
    const int head = kv_head * p.heads_of_kv + index - token * p.heads_of_kv;
    return {head, token, column < p.group && token < segment.count};
  } else {
    return {segment.head * p.group + column, 0, column < p.group};
  }
}

// The row of the query and of the output with a new token of a segment.
template <class A>
__device__ inline int row_of(const Segment<A>& segment, int token) {
  if constexpr (A::kHasManyQueries) return segment.first_row + token;
  return segment.sequence;
}

// The tiles [begin, end) of a warp, none for some, and the segment with the first of them.
template <class A>
struct Range {
  int begin, end;
  Segment<A> first;
  BlockRange block;
};

__device__ inline int inclusive_sum(int v, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, v, step);
    if (lane >= step) v += before;
  }
  return v;
}

// The range of this warp. It follows from the lengths alone, so that it is the same in every run,
// and every warp finds it for itself. Every warp of a block with tiles gets one, but for the last
// block. Where that leaves a part of the blocks without any, only one of the blocks that a
// multiprocessor holds works, so that the next kernel finds room to begin early.
template <class A>
__device__ inline Range<A> range_of_warp(const Params& p) {
  const int lane = threadIdx.x % 32;
  // 1. Every lane adds up some sequences.
  int count = divide_up(p.sequences, 32);
  const int first = lane * count;
  Segment<A> mine;
  int tiles = 0;
  for (int i = first; i < min(first + count, p.sequences); ++i) {
    mine.read(p, i);
    tiles += mine.tiles;
  }
  int sum = inclusive_sum(tiles, lane);
  const int total = __shfl_sync(kAllLanes, sum, 31) * p.kv_heads;
  Range<A> r;
  // At least divide_up(total, blocks) in a block.
  const int length = static_cast<int>(__umulhi(max(total - 1, 0), p.inverse_blocks)) + 1;
  const int share = divide_up(length <= A::kWarps ? length * p.resident : length, A::kWarps);
  const int begin = min(total, static_cast<int>(blockIdx.x) * A::kWarps * share);
  r.block = {begin, min(total, begin + A::kWarps * share), share};
  r.begin = r.block.begin_of(threadIdx.x / 32);
  r.end = r.block.begin_of(threadIdx.x / 32 + 1);
  if (r.begin == r.end) return r;
  // 2. Finds the lane with the range's first tile, then spreads its sequences over the lanes, and
  // so on until it has the sequence.
  int before = 0;  // tiles of one head before those of lane 0
  auto find = [&] {
    const uint32_t lanes = __ballot_sync(kAllLanes, (before + sum) * p.kv_heads > r.begin);
    const int found = lanes == 0 ? 32 : __ffs(lanes) - 1;
    before += __shfl_sync(kAllLanes, lanes == 0 ? sum : sum - tiles, min(found, 31));
    return found;
  };
  int found = find(), sequence = found * count;
  for (bool is_found = count == 1; !is_found; is_found = found < 32) {
    tiles = 0;
    if (lane < count && sequence + lane < p.sequences) {
      mine.read(p, sequence + lane);
      tiles = mine.tiles;
    }
    sum = inclusive_sum(tiles, lane);
    found = find();
    sequence += found;
    count -= 32;
  }
  r.first.take_tokens(mine, found);
  r.first.place(p, sequence, __shfl_sync(kAllLanes, mine.length, found));
  r.first.head = (r.begin - before * p.kv_heads) / r.first.tiles;
  r.first.begin = before * p.kv_heads + r.first.head * r.first.tiles;
  return r;
}

}  // namespace qoq::kv
