// A warp's ring in shared memory, and the bulk copies of pages or of their parts that fill it.
#pragma once

#include "common/ptx.cuh"
#include "kv/decode_work.cuh"

namespace qoq::kv {

// Loads every kWarps-th tile of a range. The block table is read one tile ahead, since the copy
// waits for it; at the beginning it is read for all stages at once.
template <class A>
class Loader {
 public:
  // `copy` is the one of p.copies that this lane does.
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

  // Loads into the stage that the warp read longest ago. It is called after __syncwarp.
  __device__ void load_next() {
    if (next_.units == 0) return;
    load(next_);
    next_ = find();
  }

 private:
  // Where a tile comes from. It has `units` units, 0 behind the last tile; this lane copies from
  // `offset` in block `page` of the cache, and nothing where `offset` is -1.
  struct Place {
    int units, page, offset;
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
  Segment segment_;  // the segment of tile_, which is the next tile to be found
  int tile_, end_, stage_ = 0;
  uint32_t ring_, barriers_;
  Place next_;
};

}  // namespace qoq::kv
