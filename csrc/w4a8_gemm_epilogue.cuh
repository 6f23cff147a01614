// From the sums in registers to the output: over the L2, over a cluster, or straight.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/ptx.cuh"
#include "w4a8_gemm_config.h"
#include "w4a8_gemm_work.cuh"

namespace qoq::w4a8 {

__device__ inline float load_bias(const Params& p, int channel) {
  switch (p.bias_type) {
    case Bias::kFloat32:
      return static_cast<const float*>(p.bias)[channel];
    case Bias::kBfloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p.bias)[channel]);
    case Bias::kFloat16:
      return __half2float(static_cast<const __half*>(p.bias)[channel]);
    default:
      return 0.f;
  }
}

// Two tokens of one channel in 32 bits.
__device__ inline uint32_t round_to_output(Output type, float low, float high) {
  if (type == Output::kBfloat16) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  }
  const __half2 v = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}

// The constants of a tile, one channel and one token a thread. They are fetched before the sums
// are made and put into shared memory after.
template <class Tile>
struct Constants {
  float scale = 0.f, zero = 0.f, bias = 0.f, x_scale = 0.f;
  int32_t row_sum = 0;

  __device__ void fetch(const Params& p, int first_token, int first_channel, int thread) {
    const int channel = first_channel + thread;
    if (thread < Tile::kChannels && channel < p.n) {
      scale = __ldg(p.channel_scale + channel);
      if (p.channel_zero != nullptr) zero = __ldg(p.channel_zero + channel);
      bias = load_bias(p, channel);
    }
    const int token = first_token + thread;
    if (thread < Tile::kTokens && token < p.m) {
      x_scale = __ldcg(p.x_scale + token);
      row_sum = __ldcg(p.x_row_sum + token);
    }
  }
};

// Constants in shared memory.
template <class Tile>
struct SharedConstants {
  float* scale;
  float* zero;
  float* bias;
  float* x_scale;
  int32_t* row_sum;

  __device__ explicit SharedConstants(char* base)
      : scale(reinterpret_cast<float*>(base)),
        zero(scale + Tile::kChannels),
        bias(zero + Tile::kChannels),
        x_scale(bias + Tile::kChannels),
        row_sum(reinterpret_cast<int32_t*>(x_scale + Tile::kTokens)) {}

  __device__ void store(const Constants<Tile>& c, int thread) const {
    if (thread < Tile::kChannels) {
      scale[thread] = c.scale;
      zero[thread] = c.zero;
      bias[thread] = c.bias;
    }
    if (thread < Tile::kTokens) {
      x_scale[thread] = c.x_scale;
      row_sum[thread] = c.row_sum;
    }
  }
};

template <class Tile>
using Accumulators = int32_t[Tile::kWeightBlocks][Tile::kAccumulators];

// Adds this block's share of a tile to the others'. True in the block that completes the sum,
// which then holds it in its registers.
template <class Tile, bool kGrouped>
__device__ bool add_to_shared_tile(Accumulators<Tile>& acc, const Params& p, const Work& work,
                                   const SharedMemory<Tile, kGrouped>& shared, char* shared_base) {
  const int thread = threadIdx.x;
  const int slot = (work.tile - p.whole_tiles) * Tile::kShare + blockIdx.x % Tile::kShare;
  int32_t* sums = p.workspace + kCounters + static_cast<int64_t>(slot) * Tile::kTileInts + thread;
#pragma unroll
  for (int b = 0; b < Tile::kWeightBlocks; ++b)
#pragma unroll
    for (int i = 0; i < Tile::kAccumulators; ++i)
      ptx::red_add(sums + (b * Tile::kAccumulators + i) * kConsumers, acc[b][i]);

  int* is_last = reinterpret_cast<int*>(shared_base + (shared.flag() - shared.base));
  ptx::named_barrier_sync(1, kConsumers);
  if (thread == 0) {
    __threadfence();
    const int share = work.k_end - work.k_begin;
    const int before = atomicAdd(p.workspace + slot, share);
    *is_last = before + share == p.k_blocks;
    __threadfence();
  }
  ptx::named_barrier_sync(1, kConsumers);
  if (!*is_last) return false;

  if (thread == 0) p.workspace[slot] = 0;
#pragma unroll
  for (int b = 0; b < Tile::kWeightBlocks; ++b)
#pragma unroll
    for (int i = 0; i < Tile::kAccumulators; ++i)
      acc[b][i] = __ldcg(sums + (b * Tile::kAccumulators + i) * kConsumers);
#pragma unroll
  for (int b = 0; b < Tile::kWeightBlocks; ++b)
#pragma unroll
    for (int i = 0; i < Tile::kAccumulators; ++i)
      __stcg(sums + (b * Tile::kAccumulators + i) * kConsumers, 0);
  return true;
}

// The order of `reference.epilogue`, and no fused multiply-adds.
template <bool kGrouped>
__device__ inline float epilogue(int32_t sum, float x_scale, int32_t row_sum, float scale,
                                 float zero, float bias, bool has_bias) {
  if constexpr (kGrouped) sum -= 128 * row_sum;
  float y = __fmul_rn(__int2float_rn(sum), scale);
  if constexpr (!kGrouped) y = __fsub_rn(y, __fmul_rn(__int2float_rn(row_sum), zero));
  y = __fmul_rn(y, x_scale);
  return has_bias ? __fadd_rn(y, bias) : y;
}

// Adds up the tile of a cluster: every block puts its sums into its own shared memory, then takes
// an equal part of the output and reads all the others' sums of it.
template <class Tile, bool kGrouped>
__device__ void add_up_cluster(const Accumulators<Tile>& acc, const Params& p, TilePosition at,
                               const SharedMemory<Tile, kGrouped>& shared, char* shared_base) {
  const int thread = threadIdx.x, lane = thread % 32;
  const int group = thread / 128, warp = thread % 128 / 32;
  ptx::named_barrier_sync(1, kConsumers);  // nobody reads the ring any more

  // 1. Registers to [token][channel].
#pragma unroll
  for (int b = 0; b < Tile::kWeightBlocks; ++b) {
    const int channel = group * Tile::kGroupChannels + b * kBlockN + warp * 16 + lane / 4;
    const uint32_t sums = shared.base + (2 * (lane % 4) * Tile::kSumPitch + channel) * 4;
#pragma unroll
    for (int i = 0; i < Tile::kAccumulators; ++i) {
      const int token = i / 4 * 8 + i % 2, half = i / 2 % 2;
      ptx::store_shared_4(sums + (token * Tile::kSumPitch + half * 8) * 4, acc[b][i]);
    }
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();

  // 2. Eight channels of a token at a time.
  constexpr int kVectors = Tile::kChannels / 8;
  const SharedConstants<Tile> constants(shared_base + (shared.constants() - shared.base));
  const int first_token = at.m * Tile::kTokens, first_channel = at.n * Tile::kChannels;
  const int items = min(Tile::kTokens, p.m - first_token) * kVectors;
  const bool has_bias = p.bias_type != Bias::kNone;
  const uint32_t share = ptx::cluster_rank() % Tile::kShare,
                 part = ptx::cluster_rank() / Tile::kShare;
  for (int i = part * kConsumers + thread; i < items; i += p.split * kConsumers) {
    const int token = i / kVectors, channel = i % kVectors * 8;
    if (first_channel + channel >= p.n) continue;
    const uint32_t address = shared.base + (token * Tile::kSumPitch + channel) * 4;
    int32_t sums[8] = {};
#pragma unroll 4
    for (int rank = 0; rank < p.split; ++rank) {
      const uint32_t mapped = ptx::map_to_rank(address, rank * Tile::kShare + share);
      const int4 low = ptx::load_cluster_16(mapped), high = ptx::load_cluster_16(mapped + 16);
      const int32_t values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[j] += values[j];
    }
    const float x_scale = constants.x_scale[token];
    const int32_t row_sum = constants.row_sum[token];
    float y[8];
#pragma unroll
    for (int j = 0; j < 8; ++j)
      y[j] = epilogue<kGrouped>(sums[j], x_scale, row_sum, constants.scale[channel + j],
                                constants.zero[channel + j], constants.bias[channel + j], has_bias);
    uint4 v;
    v.x = round_to_output(p.out_type, y[0], y[1]);
    v.y = round_to_output(p.out_type, y[2], y[3]);
    v.z = round_to_output(p.out_type, y[4], y[5]);
    v.w = round_to_output(p.out_type, y[6], y[7]);
    char* out = static_cast<char*>(p.out) +
                (static_cast<int64_t>(first_token + token) * p.n + first_channel + channel) * 2;
    *reinterpret_cast<uint4*>(out) = v;
  }
}

// Writes kChunk tokens at a time: registers to rows in shared memory, rows to `out`.
template <class Tile, bool kGrouped>
__device__ void write_output(const Accumulators<Tile>& acc, const Params& p, TilePosition at,
                             const SharedMemory<Tile, kGrouped>& shared, char* shared_base) {
  constexpr int kChunk = Tile::kChunk, kRowBytes = Tile::kRowBytes;
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int warp = thread / 32, lane = thread % 32;
  const SharedConstants<Tile> constants(shared_base + (shared.constants() - shared.base));
  const uint32_t rows = shared.output() + group * kChunk * kRowBytes;
  const char* rows_pointer = shared_base + (rows - shared.base);
  const int first_channel = at.n * Tile::kChannels + group * Tile::kGroupChannels;
  const int first_token = at.m * Tile::kTokens;

#pragma unroll
  for (int chunk = 0; chunk < Tile::kTokens / kChunk; ++chunk) {
#pragma unroll
    for (int j8 = 0; j8 < kChunk / 8; ++j8) {
      const int j = chunk * (kChunk / 8) + j8;
      const int token = 8 * j + 2 * (lane % 4);
      const float2 x_scale = *reinterpret_cast<const float2*>(constants.x_scale + token);
      const int2 row_sum = *reinterpret_cast<const int2*>(constants.row_sum + token);
      uint32_t fragments[2 * Tile::kWeightBlocks];
#pragma unroll
      for (int b = 0; b < Tile::kWeightBlocks; ++b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int channel =
              group * Tile::kGroupChannels + b * kBlockN + warp * 16 + half * 8 + lane / 4;
          const float scale = constants.scale[channel], zero = constants.zero[channel];
          const float bias = constants.bias[channel];
          const int i = 4 * j + 2 * half;
          const float low = epilogue<kGrouped>(acc[b][i], x_scale.x, row_sum.x, scale, zero, bias,
                                               p.bias_type != Bias::kNone);
          const float high = epilogue<kGrouped>(acc[b][i + 1], x_scale.y, row_sum.y, scale, zero,
                                                bias, p.bias_type != Bias::kNone);
          fragments[2 * b + half] = round_to_output(p.out_type, low, high);
        }
      }
      const uint32_t row = rows + (8 * j8 + lane % 8) * kRowBytes + warp * 32;
      const int matrix = lane / 8;
      if constexpr (Tile::kWeightBlocks == 2) {
        ptx::stmatrix_x4_trans(row + (matrix / 2) * (kBlockN * 2) + (matrix % 2) * 16, fragments);
      } else {
        ptx::stmatrix_x2_trans(row + (matrix % 2) * 16, fragments[0], fragments[1]);
      }
    }
    ptx::named_barrier_sync(2 + group, 128);
    constexpr int kVectors = Tile::kGroupChannels / 8;  // of 16 bytes, in a row
    for (int i = thread; i < kChunk * kVectors; i += 128) {
      const int row = i / kVectors, column = i % kVectors;
      const int token = first_token + chunk * kChunk + row;
      const int channel = first_channel + column * 8;
      if (token < p.m && channel < p.n) {
        const uint4 v =
            *reinterpret_cast<const uint4*>(rows_pointer + row * kRowBytes + column * 16);
        char* out = static_cast<char*>(p.out) + (static_cast<int64_t>(token) * p.n + channel) * 2;
        *reinterpret_cast<uint4*>(out) = v;
      }
    }
    ptx::named_barrier_sync(2 + group, 128);
  }
}

}  // namespace qoq::w4a8
