// From the sums in registers to the output: straight, over the warps of a block, or over the L2.
#pragma once

#include "common/mma.cuh"
#include "common/ptx.cuh"
#include "gemm/portable/tiles.h"
#include "gemm/w4a8_epilogue.cuh"
#include "gemm/w4a8_work.cuh"

namespace qoq::w4a8::portable {

template <class Tile>
using Accumulators = int32_t[Tile::kSlabs][Tile::kOctets][4];
template <class Tile>
using OutAccumulators = int32_t[Tile::kSlabs][Tile::kOutOctets][4];

// A warp's place in the tile.
template <class Tile>
struct WarpPlace {
  int channels, tokens, inputs;

  __device__ WarpPlace() {
    const int warp = threadIdx.x / 32;
    channels = warp % Tile::kChannelWarps;
    tokens = warp / Tile::kChannelWarps % Tile::kTokenWarps;
    inputs = warp / (Tile::kChannelWarps * Tile::kTokenWarps);
  }
  // The first token of the tile that this warp writes, and whether it writes any.
  __device__ int first_out_token() const {
    return tokens * Tile::kWarpTokens + inputs * Tile::kOutOctets * 8;
  }
  __device__ bool writes() const { return inputs * Tile::kOutOctets < Tile::kOctets; }
};

// Where warps have divided k, gives each of them the sums of its share of the tokens, over shared
// memory, an octet of each share at a time.
template <class Tile>
__device__ void add_up_warps(const Accumulators<Tile>& acc, OutAccumulators<Tile>& sums,
                             uint32_t exchange) {
  if constexpr (Tile::kInputWarps == 1) {
#pragma unroll
    for (int s = 0; s < Tile::kSlabs; ++s)
#pragma unroll
      for (int o = 0; o < Tile::kOctets; ++o)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[s][o][i] = acc[s][o][i];
  } else {
    const WarpPlace<Tile> place;
    // Registers have no index at run time. Of one octet, the first warp has the sums.
    constexpr int kSecond = Tile::kOctets > 1 ? Tile::kOutOctets : 0;
    const bool is_first = place.inputs == 0;
    // 16 bytes of each thread, for the warp that writes what is in them.
    auto address = [&](int part, int slab) {
      return exchange + ((part * Tile::kSlabs + slab) * 128 + threadIdx.x % 128) * 16;
    };
#pragma unroll
    for (int o = 0; o < Tile::kOutOctets; ++o) {
      ptx::named_barrier_sync(1, Tile::kThreads);
#pragma unroll
      for (int s = 0; s < Tile::kSlabs; ++s) {
        int32_t others[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          others[i] = is_first ? acc[s][kSecond + o][i] : acc[s][o][i];
        ptx::store_shared_16(address(is_first ? 1 : 0, s), others);
      }
      ptx::named_barrier_sync(1, Tile::kThreads);
#pragma unroll
      for (int s = 0; s < Tile::kSlabs; ++s) {
        const uint4 v = ptx::load_shared_16(address(place.inputs, s));
        const uint32_t others[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sums[s][o][i] = static_cast<int32_t>(others[i]) +
                          (is_first ? acc[s][o][i] : acc[s][kSecond + o][i]);
      }
    }
  }
}

// Writes this warp's part of a tile, 8 tokens at a time, through shared memory of its own.
template <class Tile, Weights kWeights>
__device__ void write_output(const OutAccumulators<Tile>& sums, const Params& p, TilePosition at,
                             const SharedConstants<Tile>& constants, uint32_t output) {
  const WarpPlace<Tile> place;
  if (!place.writes()) return;
  const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
  const int first_channel = place.channels * Tile::kSlabs * 16,
            first_token = place.first_out_token();
  const uint32_t buffer = output + threadIdx.x / 32 * Tile::kOutputBytes;
  const bool has_bias = p.bias_type != Bias::kNone;
#pragma unroll
  for (int o = 0; o < Tile::kOutOctets; ++o) {
    const int token = first_token + 8 * o;
    const float2 x_scale = *reinterpret_cast<const float2*>(constants.x_scale + token + 2 * pair);
    const int2 row_sum = *reinterpret_cast<const int2*>(constants.row_sum + token + 2 * pair);
#pragma unroll
    for (int s = 0; s < Tile::kSlabs; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int channel = first_channel + 16 * s + 8 * half + group;
        const float scale = constants.scale[channel], zero = constants.zero[channel],
                    bias = constants.bias[channel];
        const int32_t* values = sums[s][o] + 2 * half;
        const float low =
            epilogue<kWeights>(values[0], x_scale.x, row_sum.x, scale, zero, bias, has_bias);
        const float high =
            epilogue<kWeights>(values[1], x_scale.y, row_sum.y, scale, zero, bias, has_bias);
        // Of two tokens and a channel; transposed, of a token and two channels.
        const uint32_t transposed = ptx::movmatrix_trans(round_to_output(p.out_type, low, high));
        ptx::store_shared_4(
            buffer + group * Tile::kOutputRowBytes + (16 * s + 8 * half + 2 * pair) * 2,
            transposed);
      }
    __syncwarp();
    constexpr int kPieces = 2 * Tile::kSlabs;  // of 16 bytes, in a row
#pragma unroll
    for (int first = 0; first < 8 * kPieces; first += 32) {
      const int row = (first + lane) / kPieces, piece = (first + lane) % kPieces;
      const int m = at.m * Tile::kTokens + token + row;
      const int n = at.n * Tile::kChannels + first_channel + 8 * piece;
      if (row < 8 && m < p.m && n < p.n) {
        auto* out = static_cast<char*>(p.out) + (int64_t{m} * p.n + n) * 2;
        *reinterpret_cast<uint4*>(out) =
            ptx::load_shared_16(buffer + row * Tile::kOutputRowBytes + 16 * piece);
      }
    }
    __syncwarp();
  }
}

}  // namespace qoq::w4a8::portable
