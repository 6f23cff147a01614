// Who computes what: on the host, once a launch.
#pragma once

#include <algorithm>

#include "w4a8_gemm_config.h"

namespace qoq::w4a8 {

// Adding up partial sums takes as long as so many k_blocks: in the L2, within a cluster.
inline constexpr int kSumInL2 = 10, kSumInCluster = 4;

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

// Fills in the work of `p` from its tiles, of which `share` blocks do one. `clusters[size]`
// clusters of `size` blocks run at a time. Returns the number of blocks over `share`.
//
// Few tiles: k is split over as many blocks of a cluster as run at the same time. Many: whole tiles
// while they fill rounds, and what is left over is one more round, or is cut along k so that all
// finish together.
inline int schedule(Params& p, int share, const int (&clusters)[kMaxCluster + 1]) {
  const int tiles = p.tiles_m * p.tiles_n, slots = clusters[share];
  p.split = 1;
  for (int split = 2; split <= std::min(kMaxCluster / share, p.k_blocks); ++split)
    if (tiles <= clusters[split * share]) p.split = split;
  if (p.split > 1) {
    p.whole_tiles = p.piece = 0;
    return tiles * p.split;
  }
  const int rounds = tiles / slots, rest = tiles % slots;
  const int cut = divide_up(rest * p.k_blocks, slots);
  const bool is_cut = rest > 0 && cut + kSumInL2 < p.k_blocks;
  p.whole_tiles = is_cut ? rounds * slots : tiles;
  p.piece = is_cut ? cut : 0;
  if (p.whole_tiles > 0) return std::min(tiles, slots);
  return divide_up(rest * p.k_blocks, cut);
}

// How many k_blocks the busiest block does one after the other.
inline int longest_path(const Params& p, int share, const int (&clusters)[kMaxCluster + 1]) {
  if (p.split > 1) return divide_up(p.k_blocks, p.split) + kSumInCluster;
  const int whole = divide_up(p.whole_tiles, clusters[share]) * p.k_blocks;
  return whole + (p.piece > 0 ? p.piece + kSumInL2 : 0);
}

}  // namespace qoq::w4a8
