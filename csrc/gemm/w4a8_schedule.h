// Decides who computes what, on the host, once for each launch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gemm/w4a8_config.h"

namespace qoq::w4a8 {

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

// What a tile takes, in nanoseconds: a step of k with all multiprocessors busy, writing the output,
// and adding up in the L2 before it.
struct Cost {
  int step, output, sum;
};

inline constexpr int kImpossible = 1 << 30;  // nanoseconds

// Divides k of each tile over as many clusters as pay, if there are slots for them. Returns
// nanoseconds, or kImpossible if there are more tiles than slots.
template <class Tile>
int divide_k(Params& p, int tiles, int slots, const Cost& cost, int& clusters) {
  int best = kImpossible;
  for (int split = 1; split <= std::min(slots / tiles, p.steps); ++split) {
    // A cluster divides its steps further.
    const int steps = divide_up(divide_up(p.steps, split), Tile::kCluster / Tile::kClusterTiles);
    const int64_t time = int64_t{steps} * cost.step + cost.output + (split > 1 ? cost.sum : 0);
    if (time >= best) continue;
    best = static_cast<int>(time);
    p.split = split;
    clusters = tiles * split;
  }
  return best;
}

// Fills in the work of `p` from its size. As many clusters run at a time as there are slots.
// Returns nanoseconds, without the launch and the first fetch; `clusters` is the size of the grid.
//
// If there are few tiles, k of each is divided over as many clusters as pay. If there are many,
// they are done whole while they fill rounds; what is left over is one more round, or is cut along
// k so that all end together.
template <class Tile>
int schedule(Params& p, int slots, const Cost& cost, int& clusters) {
  p.tiles_m = divide_up(p.m, Tile::kTokens);
  p.tiles_n = divide_up(p.n, Tile::kChannels * Tile::kClusterTiles);
  p.steps = divide_up(p.k_blocks, Tile::kStepBlocks);
  // Copies that reach far past the last token are slow.
  const int tail = p.m - (p.tiles_m - 1) * Tile::kTokens;
  p.tail_tokens = divide_up(tail, 8 * Tile::kClusterTiles) * 8;
  p.split = p.whole_tiles = p.piece = 0;
  const int tiles = p.tiles_m * p.tiles_n;
  const int best = divide_k<Tile>(p, tiles, slots, cost, clusters);
  if (Tile::kByInputs || best < kImpossible) return best;

  const int rounds = tiles / slots, rest = tiles % slots;
  const int64_t whole = int64_t{p.steps} * cost.step + cost.output;
  const int piece = divide_up(rest * p.steps, slots);
  const int64_t cut = int64_t{piece} * cost.step + cost.output + cost.sum;
  const bool is_cut = rest > 0 && cut < whole;
  p.whole_tiles = is_cut ? rounds * slots : tiles;
  p.piece = is_cut ? piece : 0;
  clusters = slots;
  const int64_t time = rounds * whole + (is_cut ? cut : rest > 0 ? whole : 0);
  return static_cast<int>(std::min<int64_t>(time, kImpossible - 1));
}

// Fills in the work of `p` as if all its tiles were there. On the device (`counted`) those that are
// not are left out, so that their number only decides how k is divided. Returns nanoseconds.
template <class Tile>
int schedule(ExpertParams& p, int slots, const Cost& cost, int& clusters) {
  static_assert(!Tile::kByInputs && Tile::kCluster == 1);
  p.tiles_m = p.max_tiles;
  p.tiles_n = divide_up(p.n, Tile::kChannels);
  p.steps = divide_up(p.k_blocks, Tile::kStepBlocks);
  p.tail_tokens = Tile::kTokens;
  p.split = p.whole_tiles = p.piece = 0;
  const int tiles = p.tiles_m * p.tiles_n;
  const int best = divide_k<Tile>(p, tiles, slots, cost, clusters);
  if (best < kImpossible) return best;
  clusters = slots;
  const int64_t whole = int64_t{p.steps} * cost.step + cost.output;
  return static_cast<int>(std::min<int64_t>(divide_up(tiles, slots) * whole, kImpossible - 1));
}

}  // namespace qoq::w4a8
