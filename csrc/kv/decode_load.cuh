// A warp's ring in shared memory, and the copies of pages or of their parts that fill it.
#pragma once

#include <type_traits>

#include "common/cp_async.cuh"
#include "common/ptx.cuh"
#include "kv/decode_work.cuh"

namespace qoq::kv {

// Where a tile comes from. It has `units` units, 0 behind the last tile; this lane's part of it is
// at `offset` in block `page` of the cache, and nothing where `offset` is -1.
struct Place {
  int units, page, offset;
};

// Copies by the copy engine, a part of the tile by each lane; a barrier of the stage counts bytes.
template <class A>
struct EngineCopies {
  __device__ static void prepare(uint32_t barriers) {
    if (threadIdx.x % 32 == 0) {
      for (int i = 0; i < A::kStages; ++i) ptx::mbarrier_init(barriers + i * 8, 1);
      ptx::fence_mbarrier_init();
    }
    __syncwarp();
  }

  __device__ static void start(const Params& p, const Copy& copy, const Place& place,
                               uint32_t stage, uint32_t barrier) {
    if (place.units == 0) return;
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive_expect_tx(barrier, place.units * p.unit_bytes);
    __syncwarp();
    if (place.offset < 0) return;
    const uint8_t* source = p.cache + int64_t{place.page} * p.block_stride + place.offset;
    ptx::cp_async_bulk(stage + copy.destination(), source, copy.bytes(), barrier,
                       ptx::l2_policy_evict_first());
  }

  __device__ static void wait(uint32_t barrier, uint32_t parity) {
    ptx::mbarrier_wait(barrier, parity);
  }
};

// Copies by all lanes together, 16 bytes each. Each tile is a group of copies, and so is
// the nothing behind the last one, so that the oldest of as many groups as stages is the next tile.
template <class A>
struct LaneCopies {
  __device__ static void prepare(uint32_t) {}

  __device__ static void start(const Params& p, const Copy&, const Place& place, uint32_t stage,
                               uint32_t) {
    if (place.units > 0) {
      if (p.copy_count == kParts) {
        copy_parts(p, place, stage);
      } else {
        copy_any(p, place, stage);
      }
    }
    ptx::cp_async_commit_group();
  }

  __device__ static void wait(uint32_t, uint32_t) {
    ptx::cp_async_wait_group<A::kStages - 1>();
    __syncwarp();
  }

 private:
  // A tile that is a part of one page: K codes, V codes, K scales and V scales (`lay_out`).
  static constexpr int kParts = 4, kLaneBytes = 16, kWarpBytes = 32 * kLaneBytes;

  __device__ static void copy_parts(const Params& p, const Place& place, uint32_t stage) {
    constexpr int kKeys = kTileTokens * A::K::kRow, kValues = kTileTokens * A::V::kRow;
    constexpr int kMost = kKeys > kValues ? kKeys : kValues;
    constexpr int kScaleLanes = kTileTokens * kScaleBytes / 16;
    static_assert(kKeys % kWarpBytes == 0 && kValues % kWarpBytes == 0);
    const int lane = threadIdx.x % 32;
    const uint8_t* page = p.cache + int64_t{__shfl_sync(kAllLanes, place.page, 0)} * p.block_stride;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int from = __shfl_sync(kAllLanes, place.offset, part) + lane * kLaneBytes;
      const uint32_t to = stage + part * kKeys + lane * kLaneBytes;
#pragma unroll
      for (int at = 0; at < kMost; at += kWarpBytes)
        if (at < (part == 0 ? kKeys : kValues)) ptx::cp_async_16(to + at, page + from + at);
    }
    const int part = lane / kScaleLanes % 2, at = lane % kScaleLanes * kLaneBytes;
    const int from = __shfl_sync(kAllLanes, place.offset, 2 + part) + at;
    if (lane < 2 * kScaleLanes)
      ptx::cp_async_16(stage + kKeys + kValues + lane * kLaneBytes, page + from);
  }

  // One copy after the other.
  __device__ static void copy_any(const Params& p, const Place& place, uint32_t stage) {
    for (int i = 0; i < p.copy_count; ++i) {
      const int offset = __shfl_sync(kAllLanes, place.offset, i);
      const int page = __shfl_sync(kAllLanes, place.page, i);
      if (offset < 0) continue;
      const uint8_t* source = p.cache + int64_t{page} * p.block_stride + offset;
      for (int at = kLaneBytes * (threadIdx.x % 32); at < p.copies[i].bytes(); at += kWarpBytes)
        ptx::cp_async_16(stage + p.copies[i].destination() + at, source + at);
    }
  }
};

template <class A>
using Copies = std::conditional_t<ptx::kHasCopyEngine, EngineCopies<A>, LaneCopies<A>>;

// Loads the tiles of a range, each into the stage `stage_of`. The block table is read one tile
// ahead, since the copy waits for it; at the beginning it is read for all stages at once.
template <class A>
class Loader {
 public:
  // `copy` is the one of p.copies that this lane does. The ring's barriers are behind its stages.
  __device__ Loader(const Params& p, const Copy& copy, const Range<A>& range, uint32_t ring)
      : p_(p),
        copy_(copy),
        segment_(range.first),
        begin_(range.begin),
        end_(range.end),
        ring_(ring) {
    Place places[A::kStages];
#pragma unroll
    for (int i = 0; i < A::kStages; ++i) places[i] = find(begin_ + i);
#pragma unroll
    for (int i = 0; i < A::kStages; ++i) load(places[i], i);
    next_ = find(begin_ + A::kStages);
  }

  // Waits for a tile and returns where it is.
  __device__ uint32_t wait(int tile) const {
    const int stage = stage_of(tile);
    Copies<A>::wait(barrier(stage), (tile - begin_) / A::kStages % 2);
    return ring_ + stage * A::kStageBytes;
  }

  // Loads a later tile into the place of `tile`, which the warp has read. It is called after
  // __syncwarp, for one tile after the other.
  __device__ void replace(int tile) {
    load(next_, stage_of(tile));
    next_ = find(tile + 1 + A::kStages);
  }

 private:
  // The stage of a tile's place.
  __device__ int stage_of(int tile) const { return (tile - begin_) % A::kStages; }

  __device__ uint32_t barrier(int stage) const { return ring_ + A::kWarpTilesBytes + stage * 8; }

  __device__ void load(const Place& place, int stage) {
    Copies<A>::start(p_, copy_, place, ring_ + stage * A::kStageBytes, barrier(stage));
  }

  __device__ Place find(int tile) {
    Place place{0, 0, -1};
    if (tile >= end_) return place;
    while (tile >= segment_.end()) segment_.next(p_);
    const int first = segment_.token_of(p_, tile);
    const bool has_second =
        p_.unit_tokens < kTileTokens && segment_.length - first > kTileTokens / 2;
    place.units = has_second ? 2 : 1;
    const int token = first + copy_.token();
    if (copy_.bytes() == 0 || token >= segment_.length) return place;
    const int index = __umulhi(token / kTokenMultiple * 2, p_.inverse_page);
    constexpr bool kIsShifted = A::kHasManyQueries || has_one_tile(A::kHeadSize);
    const int head = kIsShifted ? segment_.head >> p_.head_shift : segment_.head;
    place.offset =
        head * p_.head_stride + copy_.source() + (token - index * p_.page_tokens) * copy_.step();
    place.page = p_.block_table[segment_.sequence * p_.table_stride + index];
    return place;
  }

  const Params& p_;
  const Copy copy_;
  Segment<A> segment_;  // of the tile that was found last
  const int begin_, end_;
  const uint32_t ring_;
  Place next_;
};

}  // namespace qoq::kv
