// A warp's ring in shared memory and what fills it: bulk copies of pages or of their parts.
#pragma once

#include "common/ptx.cuh"
#include "kv_decode_work.cuh"

namespace qoq::kv {

// Loads every kWarps-th tile of a range. The block table is read one tile ahead, since the copy
// waits for it.
template <class A>
class Loader {
 public:
  __device__ Loader(const Params& p, const Range& range, uint32_t ring, uint32_t barriers)
      : p_(p),
        segment_(range.first),
        tile_(range.begin + threadIdx.x / 32),
        end_(range.end),
        ring_(ring),
        barriers_(barriers) {
    find_page();
  }

  // Into the stage that the warp has read longest ago, after __syncwarp.
  __device__ void load_next() {
    if (tile_ >= end_) return;
    const bool has_second =
        p_.unit_tokens < kTileTokens && segment_.length - first_token() > kTileTokens / 2;
    const int units = has_second ? 2 : 1;
    const uint32_t barrier = barriers_ + stage_ * 8;
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive_expect_tx(barrier, units * p_.unit_bytes);
    __syncwarp();
    if (page_token_ >= 0) {
      const Copy& copy = p_.copies[threadIdx.x % 32];
      const uint8_t* source = p_.cache + int64_t{page_} * p_.block_stride +
                              segment_.head * p_.head_stride + copy.source +
                              page_token_ * copy.source_step;
      ptx::cp_async_bulk(ring_ + stage_ * A::kStageBytes + copy.destination, source, copy.bytes,
                         barrier, ptx::l2_policy_evict_first());
    }
    stage_ = stage_ + 1 == A::kStages ? 0 : stage_ + 1;
    tile_ += kWarps;
    find_page();
  }

 private:
  __device__ int first_token() const {
    return (segment_.first_tile + tile_ - segment_.begin) * kTileTokens;
  }

  // Of this lane's copy.
  __device__ void find_page() {
    if (tile_ >= end_) return;
    while (tile_ >= segment_.end()) segment_.next(p_);
    page_token_ = -1;
    const int lane = threadIdx.x % 32;
    if (lane >= p_.copy_count) return;
    const int token = first_token() + p_.copies[lane].token;
    if (token >= segment_.length) return;
    const int index = __umulhi(token / kTokenMultiple * 2, p_.inverse_page);
    page_token_ = token - index * p_.page_tokens;
    page_ = __ldcg(p_.block_table + segment_.sequence * p_.table_stride + index);
  }

  const Params& p_;
  Segment segment_;  // of tile_, the next one
  int tile_, end_, stage_ = 0;
  uint32_t ring_, barriers_;
  int page_ = 0, page_token_ = -1;  // of this lane's copy; -1: none
};

}  // namespace qoq::kv
