// A warp's ring in shared memory and what fills it: bulk copies of pages or of their parts.
#pragma once

#include "common/ptx.cuh"
#include "kv/decode_work.cuh"

namespace qoq::kv {

// Loads every kWarps-th tile of a range. The block table is read one tile ahead, since the copy
// waits for it; at first for all stages at once.
template <class A>
class Loader {
 public:
  // `copy` is this lane's of p.copies.
  __device__ Loader(const Params& p, const Copy& copy, const Range& range, uint32_t ring,
                    uint32_t barriers)
      : p_(p),
        copy_(copy),
        segment_(range.first),
        tile_(range.begin + threadIdx.x / 32),
        end_(range.end),
        ring_(ring),
        barriers_(barriers) {
    Place places[A::kStages];
#pragma unroll
    for (Place& place : places) place = find();
#pragma unroll
    for (const Place& place : places) load(place);
    next_ = find();
  }

  // Into the stage that the warp has read longest ago, after __syncwarp.
  __device__ void load_next() {
    if (next_.units == 0) return;
    load(next_);
    next_ = find();
  }

 private:
  // Of a tile: its units, 0 behind the last tile, and where this lane's copy of it comes from.
  struct Place {
    int units, page, offset;  // offset in the block, -1: nothing to copy
  };

  __device__ void load(const Place& place) {
    if (place.units == 0) return;
    const uint32_t barrier = barriers_ + stage_ * 8;
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive_expect_tx(barrier, place.units * p_.unit_bytes);
    __syncwarp();
    if (place.offset >= 0) {
      const uint8_t* source = p_.cache + int64_t{place.page} * p_.block_stride + place.offset;
      ptx::cp_async_bulk(ring_ + stage_ * A::kStageBytes + copy_.destination, source, copy_.bytes,
                         barrier, ptx::l2_policy_evict_first());
    }
    stage_ = stage_ + 1 == A::kStages ? 0 : stage_ + 1;
  }

  __device__ Place find() {
    Place place{0, 0, -1};
    if (tile_ >= end_) return place;
    while (tile_ >= segment_.end()) segment_.next(p_);
    const int first = (segment_.first_tile + tile_ - segment_.begin) * kTileTokens;
    tile_ += kWarps;
    const bool has_second =
        p_.unit_tokens < kTileTokens && segment_.length - first > kTileTokens / 2;
    place.units = has_second ? 2 : 1;
    const int token = first + copy_.token;
    if (copy_.bytes == 0 || token >= segment_.length) return place;
    const int index = __umulhi(token / kTokenMultiple * 2, p_.inverse_page);
    place.offset = segment_.head * p_.head_stride + copy_.source +
                   (token - index * p_.page_tokens) * copy_.source_step;
    place.page = p_.block_table[segment_.sequence * p_.table_stride + index];
    return place;
  }

  const Params& p_;
  const Copy copy_;
  Segment segment_;  // of tile_, the next to be found
  int tile_, end_, stage_ = 0;
  uint32_t ring_, barriers_;
  Place next_;
};

}  // namespace qoq::kv
