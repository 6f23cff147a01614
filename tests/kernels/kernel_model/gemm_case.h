// Layers with random numbers for the programs that run a W4A8 kernel on the model, and what comes
// out by plain loops, bit by bit.
#pragma once

#include <string>

#include "common/ptx.cuh"  // the model
#include "gemm/w4a8_epilogue.cuh"
#include "gemm/w4a8_schedule.h"
#include "gemm/w4a8_work.cuh"

using namespace qoq::w4a8;

namespace {

std::mt19937 values;
int random_int(int low, int high) { return low + static_cast<int>(values() % (high - low)); }

// The layout of vllm_qoq/ops/w4a8_layout.py, written a second time; of codes alone with no `groups`
// in a k_block.
std::vector<uint8_t> pack(const std::vector<int>& q, const std::vector<int>& scale,
                          const std::vector<int>& offset, int groups, int blocks, int k) {
  const int k_blocks = k / kBlockK, bytes = kCodeBytes + groups * kParamBytes;
  std::vector<uint8_t> packed(static_cast<size_t>(blocks) * k_blocks * bytes);
  uint8_t* out = packed.data();
  for (int block = 0; block < blocks; ++block)
    for (int kb = 0; kb < k_blocks; ++kb, out += bytes) {
      for (int i = 0; i < kCodeBytes; ++i) {
        const int half = i / 2048, thread = i / 16 % 128, step = i / 8 % 2, row_half = i / 4 % 2;
        const int lane = thread % 32;
        const int row = block * 64 + thread / 32 * 16 + lane / 4 + 8 * row_half;
        const int at = row * k + kb * 128 + 64 * half + 32 * step + 4 * (lane % 4) + i % 4;
        out[i] = q[at] | q[at + 16] << 4;
      }
      for (int i = 0; i < kBlockN * groups; ++i) {
        const int pair = i / 2 / groups, group = i / 2 % groups;
        const int row = block * 64 + pair / 8 * 16 + pair % 8 + 8 * (i % 2);
        const int at = (row * k_blocks + kb) * groups + group;
        out[kCodeBytes + 2 * i] = scale[at];
        out[kCodeBytes + 2 * i + 1] = offset[at] + 128;
      }
    }
  return packed;
}

template <class T>
uint16_t bits_of(T v) {
  uint16_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
uint16_t to_16_bits(bool is_bfloat16, float v) {
  return is_bfloat16 ? bits_of(__float2bfloat16(v)) : bits_of(__float2half(v));
}

// The fields of Params of the same names, and the size of the grid.
struct Schedule {
  int clusters, split, whole_tiles, piece;
};

// Of a mixture of experts: how many have weights, whose weights each tile of rows is for, and how
// many of the tiles are there.
struct Mixture {
  int experts = 1, tile_tokens = 1, tiles = 0;
  std::vector<int> tile_expert = {};
};

struct Problem {
  int m, n, k_blocks;
  Schedule schedule;
  Bias bias = Bias::kNone;
  Output output = Output::kBfloat16;
  Mixture mixture = {};
};

// Experts whose tiles are fewer than the launch is for, of which one has two and some none: in rounds
// for two blocks, and with k divided by three, where a third of the blocks has no work.
inline std::vector<Problem> problems_of_experts(int tokens, int n, int k_blocks) {
  const Mixture some{4, tokens, 4, {0, 2, 2, 3, 1, 1}}, none{4, tokens, 0, {3, 3}};
  return {
      {6 * tokens, n, k_blocks, {2, 0}, Bias::kFloat32, Output::kBfloat16, some},
      {6 * tokens, n, 6, {36, 3}, Bias::kNone, Output::kFloat16, some},
      {2 * tokens, n, 3, {3, 0}, Bias::kNone, Output::kBfloat16, none},
  };
}
inline constexpr const char* kExpertKinds[] = {"experts in rounds", "experts split", "no expert"};

// Which planes of a nested weight a launch is told to use, and how.
enum class Planes { kBoth, kBothByFlag, kFirstByFlag };

template <class Tile>
std::string kind_of(const Params& p) {
  constexpr int kRanks = Tile::kCluster / Tile::kClusterTiles;  // that divide steps
  std::string kind = p.split == 1        ? "one cluster a tile"
                     : p.split > 1       ? "split"
                     : p.piece == 0      ? "rounds"
                     : p.whole_tiles > 0 ? "rounds and a cut one"
                                         : "cut";
  if (p.k_blocks % Tile::kStepBlocks != 0) kind += ", part of a step";
  if (p.split > 0 && p.steps / p.split < kRanks) kind += ", idle rank";
  return kind;
}

// A layer and its activations, packed and laid out.
template <Weights kWeights>
struct Case {
  const Problem problem;
  const int m, n, k_blocks, k, blocks, channels;  // channels of all experts
  std::vector<int> w, row_sum;
  std::vector<int8_t> x;
  std::vector<float> x_scale, channel_scale, zero, bias;
  std::vector<uint16_t> bias_16, out;
  std::vector<uint8_t> packed;
  std::vector<int> workspace;
  int32_t use_residual;
  Params p;

  Case(const Problem& problem, Planes planes)
      : problem(problem),
        m(problem.m),
        n(problem.n),
        k_blocks(problem.k_blocks),
        k(k_blocks * kBlockK),
        blocks(divide_up(n, kBlockN)),
        channels(problem.mixture.experts * n),
        row_sum(m),
        x(m * k),
        x_scale(m),
        channel_scale(channels),
        zero(channels),
        bias(channels),
        bias_16(channels),
        out(static_cast<size_t>(m) * n, 0x7FFF),  // NaN
        use_residual(planes == Planes::kBothByFlag) {
    constexpr bool kGrouped = kHasGroups<kWeights>;
    constexpr int kGroups = kKGroups<kWeights>;
    const int all_blocks = problem.mixture.experts * blocks;
    std::vector<int> q(all_blocks * kBlockN * k), scale(all_blocks * kBlockN * k_blocks * kGroups);
    std::vector<int> offset(scale.size());
    for (auto& v : q) v = random_int(0, 16);
    for (auto& v : x) v = random_int(-127, 128);
    for (size_t i = 0; i < scale.size(); ++i) {
      scale[i] = random_int(1, 17);
      offset[i] = random_int(-128, 128 - 15 * scale[i]);
    }
    for (int i = 0; i < m; ++i) {
      x_scale[i] = random_int(1, 100) / 1e3f;
      for (int j = 0; j < k; ++j) row_sum[i] += x[i * k + j];
    }
    for (int i = 0; i < channels; ++i) {
      channel_scale[i] = random_int(1, 100) / 1e4f;
      zero[i] = random_int(-100, 100) / 1e4f;
      bias[i] = random_int(-100, 100) / 8.f;  // 16 bits hold it
      bias_16[i] = to_16_bits(problem.bias == Bias::kBfloat16, bias[i]);
    }
    // The weights, and in a nested one what the second plane adds, as far as int8 has room.
    w = q;
    std::vector<int> residual(q.size(), kResidualZero);
    for (size_t i = 0; i < q.size() && kGrouped; ++i) {
      const size_t group = i * kGroups / kBlockK;
      w[i] = q[i] * scale[group] + offset[group];
      if (!kIsNested<kWeights>) continue;
      const int sum = std::clamp(w[i] + random_int(-8, 8), -128, 127);
      residual[i] = sum - w[i] + kResidualZero;
      if (planes != Planes::kFirstByFlag) w[i] = sum;
    }
    packed = pack(q, scale, offset, kGroups, all_blocks, k);
    const size_t first_plane = packed.size();
    if (kIsNested<kWeights>)
      std::ranges::copy(pack(residual, {}, {}, 0, all_blocks, k), std::back_inserter(packed));
    p = {
        .weight = packed.data(),
        .residual = packed.data() + first_plane,
        .use_residual = planes == Planes::kBoth ? nullptr : &use_residual,
        .x_scale = x_scale.data(),
        .x_row_sum = row_sum.data(),
        .channel_scale = channel_scale.data(),
        .channel_zero = kGrouped ? nullptr : zero.data(),
        .bias = problem.bias == Bias::kFloat32 ? static_cast<void*>(bias.data()) : bias_16.data(),
        .out = out.data(),
        .m = m,
        .n = n,
        .k_blocks = k_blocks,
        .weight_blocks = blocks,
        .bias_type = problem.bias,
        .out_type = problem.output,
        .x = x.data(),
    };
    model::bulk_memory = packed;
    model::previous_memory = {reinterpret_cast<const uint8_t*>(x.data()), x.size()};
  }
  Case(const Case&) = delete;

  // Lays out the work as the problem says, whatever `schedule` would do; returns what it is called.
  template <class Tile>
  std::string lay_out() {
    int clusters;
    schedule<Tile>(p, 1, Cost{}, clusters);  // tiles and steps
    p.split = problem.schedule.split;
    p.whole_tiles = problem.schedule.whole_tiles;
    p.piece = problem.schedule.piece;
    const int shared_tiles = p.tiles_m * p.tiles_n - p.whole_tiles;
    workspace.resize(kCounters + shared_tiles * Tile::kCluster * Tile::kTileInts);
    p.workspace = workspace.data();
    return kind_of<Tile>(p);
  }

  // The same for a mixture of experts, with as many clusters as the problem says.
  template <class Tile>
  ExpertParams lay_out_experts() {
    const Mixture& mixture = problem.mixture;
    ExpertParams all{p, &mixture.tiles, mixture.tile_expert.data(),
                     static_cast<int>(mixture.tile_expert.size())};
    int clusters;
    schedule<Tile>(all, 1, Cost{}, clusters);  // tiles and steps
    all.split = problem.schedule.split;
    workspace.resize(kCounters + all.tiles_m * all.tiles_n * Tile::kTileInts);
    all.workspace = workspace.data();
    return all;
  }

  // The expert of a row, and -1 for a row of no tile.
  int expert_of_row(int row) const {
    const Mixture& mixture = problem.mixture;
    if (mixture.tile_expert.empty()) return 0;
    const int tile = row / mixture.tile_tokens;
    return tile < mixture.tiles ? mixture.tile_expert[tile] : -1;
  }

  // How many elements differ from what they should be, and how much of the workspace is not zero.
  // Says so.
  int count_wrong(const char* name, const std::string& kind) const {
    int wrong = 0;
    for (int i = 0; i < m; ++i) {
      const int expert = expert_of_row(i);
      for (int j = 0; j < n; ++j) {
        const uint16_t found = out[static_cast<size_t>(i) * n + j];
        if (expert < 0) {  // nothing is written there
          wrong += found != 0x7FFF;
          continue;
        }
        const int channel = expert * n + j;
        int sum = 0;
        for (int t = 0; t < k; ++t) sum += w[(expert * blocks * kBlockN + j) * k + t] * x[i * k + t];
        float y = static_cast<float>(sum) * channel_scale[channel];
        if (!kHasGroups<kWeights>) y -= static_cast<float>(row_sum[i]) * zero[channel];
        y *= x_scale[i];
        if (problem.bias != Bias::kNone) y += bias[channel];
        wrong += to_16_bits(problem.output == Output::kBfloat16, y) != found;
      }
    }
    for (const int v : workspace) wrong += v != 0;
    constexpr const char* kNames[] = {"per channel", "g128",       "g64",       "g32",
                                      "nested g128", "nested g64", "nested g32"};
    std::printf("%s %s: %s: M %d N %d K %d, %d wrong\n", name,
                kNames[static_cast<int>(kWeights)], kind.c_str(), m, n, k, wrong);
    std::fflush(stdout);
    return wrong;
  }
};

// Whether what `schedule` lays out for so many multiprocessors does every step of every tile once,
// and has room for its sums.
template <class Tile>
bool is_schedule_right(int m, int n, int k_blocks, int multiprocessors, const Cost& cost) {
  Params p{.m = m, .n = n, .k_blocks = k_blocks};
  const int slots = multiprocessors * Tile::kResident / Tile::kCluster;
  int clusters = 0;
  if (schedule<Tile>(p, slots, cost, clusters) == kImpossible)
    return Tile::kByInputs && p.tiles_m * p.tiles_n > slots;
  const int tiles_n = p.tiles_n * Tile::kClusterTiles;
  std::vector<int> done(p.tiles_m * tiles_n * p.steps);
  bool is_right = clusters <= slots;
  model::as_each_block(clusters, Tile::kCluster, [&] {
    WorkList<Tile> list(p);
    Work work;
    for (int i = 0; list.next(work); ++i) {
      is_right &= i == 0 || !Tile::kByInputs;  // the sums of these overwrite the ring
      const auto [tile_m, tile_n] = position<Tile>(work.tile, p);
      const auto [begin, end] = steps_of_block<Tile>(work);
      for (int step = begin; step < end; ++step)
        ++done.at((tile_m * tiles_n + tile_n) * p.steps + step);
      const int sums = (work.tile - p.whole_tiles + 1) * Tile::kCluster;
      if (work.end - work.begin < p.steps)
        is_right &= sums <= kCounters && sums * Tile::kTileInts <= multiprocessors * kMaxTileInts;
    }
  });
  return is_right && std::all_of(done.begin(), done.end(), [](int times) { return times == 1; });
}

template <class Tile>
int count_wrong_schedules(const char* name, const Cost& cost) {
  constexpr int kLayers[][2] = {{8, 1}, {1032, 3}, {6144, 32}, {28672, 32}, {4096, 112}};
  std::vector<int> sizes = {1, Tile::kTokens};
  if (!Tile::kByInputs) sizes.push_back(17 * Tile::kTokens - 1);  // more than a band
  int wrong = 0;
  for (const int multiprocessors : {9, 116, 132})
    for (const int m : sizes)
      for (const auto& [n, k_blocks] : kLayers) {
        if (is_schedule_right<Tile>(m, n, k_blocks, multiprocessors, cost)) continue;
        ++wrong;
        std::printf("%s: the schedule of M %d N %d K %d on %d multiprocessors is wrong\n", name, m,
                    n, k_blocks * kBlockK, multiprocessors);
      }
  return wrong;
}

}  // namespace
