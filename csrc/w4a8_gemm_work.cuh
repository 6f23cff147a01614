// What one block of threads works on, and where its shared memory holds it.
#pragma once

#include "common/ptx.cuh"
#include "w4a8_gemm_config.h"

namespace qoq::w4a8 {

// k_blocks [k_begin, k_end) of one tile.
struct Work {
  int tile, k_begin, k_end;
};

// The pieces of one block of threads, in the same order for those who load and who multiply.
template <int kShare>
class WorkList {
 public:
  __device__ explicit WorkList(const Params& p) : p_(p), whole_(blockIdx.x / kShare) {
    if (p.split > 1) {
      const int tile = whole_ / p.split, rank = whole_ - tile * p.split;
      unit_ = tile * p.k_blocks + rank * p.k_blocks / p.split;
      unit_end_ = tile * p.k_blocks + (rank + 1) * p.k_blocks / p.split;
      whole_ = p.whole_tiles;
      return;
    }
    unit_ = whole_ * p.piece;
    const int units = (p.tiles_m * p.tiles_n - p.whole_tiles) * p.k_blocks;
    unit_end_ = min(unit_ + p.piece, units);
  }

  __device__ bool next(Work& work) {
    if (whole_ < p_.whole_tiles) {
      work = {whole_, 0, p_.k_blocks};
      whole_ += gridDim.x / kShare;
      return true;
    }
    if (unit_ >= unit_end_) return false;
    const int tile = unit_ / p_.k_blocks;
    const int begin = unit_ - tile * p_.k_blocks;
    const int end = min(p_.k_blocks, begin + unit_end_ - unit_);
    work = {p_.whole_tiles + tile, begin, end};
    unit_ += end - begin;
    return true;
  }

 private:
  const Params& p_;
  int whole_, unit_, unit_end_;
};

struct TilePosition {
  int m, n;  // in tiles
};

// Neighbouring tiles share weights, and no more than kBand x-tiles are in use at a time, so that
// both stay in the L2. Params::tiles_n counts clusters where blocks share tokens.
template <int kShare>
__device__ inline TilePosition position(int tile, const Params& p) {
  constexpr int kBand = 16;
  const int per_band = kBand * p.tiles_n;
  const int band = tile / per_band;
  const int in_band = tile - band * per_band;
  const int height = min(kBand, p.tiles_m - band * kBand);
  const int n = in_band / height;
  const int rank = kShare == 1 ? 0 : blockIdx.x % kShare;
  return {band * kBand + in_band - n * height, n * kShare + rank};
}

// Addresses of one stage and its barriers.
template <class Tile, bool kGrouped>
struct SharedMemory {
  uint32_t base;

  __device__ uint32_t x(int stage) const { return base + stage * Tile::kXBytes; }
  __device__ uint32_t weight(int stage, int block) const {
    return base + Tile::kStages * Tile::kXBytes + stage * Tile::template kWeightBytes<kGrouped> +
           block * kBlockBytes<kGrouped>;
  }
  __device__ uint32_t output() const { return weight(Tile::kStages, 0); }
  __device__ uint32_t constants() const { return output() + Tile::kOutputBytes; }
  __device__ uint32_t full(int stage) const {
    return constants() + Tile::kConstantBytes + 8 * stage;
  }
  __device__ uint32_t empty(int stage) const { return full(Tile::kStages + stage); }
  __device__ uint32_t flag() const { return full(2 * Tile::kStages); }
};

template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace qoq::w4a8
