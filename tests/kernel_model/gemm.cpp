// Runs the W4A8 kernel on the model of Hopper and compares it with plain loops, bit by bit.
//   gemm SEED    returns 1 where an element differs
#include "common/ptx.cuh"  // the model
#include "w4a8_gemm_kernel.cuh"
#include "w4a8_gemm_schedule.h"

using namespace qoq::w4a8;

namespace {

struct Problem {
  int m, n, k;
  bool has_bias;
};

std::mt19937 values;
int random_int(int low, int high) { return low + static_cast<int>(values() % (high - low)); }

// The layout of vllm_qoq/w4a8_layout.py, written a second time.
template <bool kGrouped>
std::vector<uint8_t> pack(const std::vector<int>& q, const std::vector<int>& scale,
                          const std::vector<int>& offset, int blocks, int k) {
  const int k_blocks = k / kBlockK;
  std::vector<uint8_t> packed(static_cast<size_t>(blocks) * k_blocks * kBlockBytes<kGrouped>);
  uint8_t* out = packed.data();
  for (int block = 0; block < blocks; ++block)
    for (int kb = 0; kb < k_blocks; ++kb, out += kBlockBytes<kGrouped>) {
      for (int i = 0; i < kCodeBytes; ++i) {
        const int half = i / 2048, thread = i / 16 % 128, step = i / 8 % 2, row_half = i / 4 % 2;
        const int lane = thread % 32;
        const int row = block * 64 + thread / 32 * 16 + lane / 4 + 8 * row_half;
        const int at = row * k + kb * 128 + 64 * half + 32 * step + 4 * (lane % 4) + i % 4;
        out[i] = q[at] | q[at + 16] << 4;
      }
      for (int i = 0; kGrouped && i < kBlockN; ++i) {
        const int row = block * 64 + i / 16 * 16 + i / 2 % 8 + 8 * (i % 2);
        out[kCodeBytes + 2 * i] = scale[row * k_blocks + kb];
        out[kCodeBytes + 2 * i + 1] = offset[row * k_blocks + kb] + 128;
      }
    }
  return packed;
}

uint16_t to_bfloat16(float v) {
  const __nv_bfloat16 rounded = __float2bfloat16(v);
  uint16_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return bits;
}

// slots: blocks that run at a time; cluster: the largest that can.
template <class Tile, bool kGrouped>
int count_wrong(const Problem& problem, int slots, int cluster) {
  const auto [m, n, k, has_bias] = problem;
  const int k_blocks = k / kBlockK, blocks = divide_up(n, kBlockN);
  std::vector<int> q(blocks * kBlockN * k), scale(blocks * kBlockN * k_blocks);
  std::vector<int> offset(scale.size()), row_sum(m);
  std::vector<int8_t> x(m * k);
  std::vector<float> x_scale(m), channel_scale(n), zero(n), bias(n);
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
  for (int i = 0; i < n; ++i) {
    channel_scale[i] = random_int(1, 100) / 1e4f;
    zero[i] = random_int(-100, 100) / 1e4f;
    bias[i] = random_int(-100, 100) / 10.f;
  }
  const std::vector<uint8_t> packed = pack<kGrouped>(q, scale, offset, blocks, k);
  std::vector<uint16_t> out(static_cast<size_t>(m) * n, 0x7FC0);  // NaN
  std::vector<int> workspace(kCounters + slots * kMaxTileInts);

  Params p{
      .weight = packed.data(),
      .x_scale = x_scale.data(),
      .x_row_sum = row_sum.data(),
      .channel_scale = channel_scale.data(),
      .channel_zero = kGrouped ? nullptr : zero.data(),
      .bias = has_bias ? bias.data() : nullptr,
      .out = out.data(),
      .workspace = workspace.data(),
      .m = m,
      .n = n,
      .k_blocks = k_blocks,
      .weight_blocks = blocks,
      .bias_type = has_bias ? Bias::kFloat32 : Bias::kNone,
      .out_type = Output::kBfloat16,
      .tiles_m = divide_up(m, Tile::kTokens),
      .tiles_n = divide_up(n, Tile::kChannels * Tile::kShare),
  };
  int clusters[kMaxCluster + 1] = {};
  for (int size = 1; size <= cluster; ++size) clusters[size] = slots / size;
  const int used = schedule(p, Tile::kShare, clusters);
  CUtensorMap map;
  const model::TensorMap x_map{x.data(), m, k, Tile::kTokens / Tile::kShare};
  std::memcpy(&map, &x_map, sizeof x_map);
  model::launch(used * Tile::kShare, p.split * Tile::kShare, Tile::template kSharedBytes<kGrouped>,
                random_int(1, 4), [&] { w4a8_gemm_kernel<Tile, kGrouped>(map, p); });

  int wrong = 0;
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      int sum = 0;
      for (int t = 0; t < k; ++t) {
        const int group = j * k_blocks + t / kBlockK;
        const int w = kGrouped ? q[j * k + t] * scale[group] + offset[group] : q[j * k + t];
        sum += w * x[i * k + t];
      }
      float y = static_cast<float>(sum) * channel_scale[j];
      if (!kGrouped) y -= static_cast<float>(row_sum[i]) * zero[j];
      y *= x_scale[i];
      if (has_bias) y += bias[j];
      wrong += to_bfloat16(y) != out[static_cast<size_t>(i) * n + j];
    }
  for (const int v : workspace) wrong += v != 0;
  std::printf(
      "tile %3d x %3d, share %d, %s, M %3d N %4d K %4d: split %d, whole %d, piece %d: %d wrong\n",
      Tile::kChannels, Tile::kTokens, Tile::kShare, kGrouped ? "g128       " : "per-channel", m, n,
      k, p.split, p.whole_tiles, p.piece, wrong);
  std::fflush(stdout);
  return wrong;
}

template <class Tile>
int count_wrong_of_tile(int m) {
  constexpr int kN = Tile::kChannels * Tile::kShare, kShare = Tile::kShare;
  int wrong = 0;
  // One tile over a cluster of eight; N and K that do not divide; k cut in pieces without and
  // with whole tiles before; whole tiles alone.
  wrong += count_wrong<Tile, true>({m, kN, 1024, false}, 8 * kShare, 8);
  wrong += count_wrong<Tile, false>({m, kN + 72, 1408, true}, 6 * kShare, 8);
  wrong += count_wrong<Tile, true>({m, 2 * kN, 2560, true}, 5 * kShare, kShare);
  wrong += count_wrong<Tile, true>({3, 4 * kN - 8, 2688, false}, 3 * kShare, kShare);
  wrong += count_wrong<Tile, false>({m + Tile::kTokens, kN, 256, false}, 3 * kShare, 8);
  return wrong;
}

}  // namespace

int main(int, char** arguments) {
  const int seed = std::atoi(arguments[1]);
  model::random_order.seed(seed);
  values.seed(seed);
  int wrong = count_wrong_of_tile<Tile8>(5) + count_wrong_of_tile<Tile16>(16) +
              count_wrong_of_tile<Tile32>(23) + count_wrong_of_tile<Tile64>(61) +
              count_wrong_of_tile<Tile128>(100) + count_wrong_of_tile<TileLarge>(128);
  return wrong != 0;
}
