// From sums to output: the constants, the arithmetic, and tiles that several blocks share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/ptx.cuh"
#include "gemm/w4a8_work.cuh"

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

// Rounds two tokens of one channel into 32 bits.
__device__ inline uint32_t round_to_output(Output type, float low, float high) {
  if (type == Output::kBfloat16) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  }
  const __half2 v = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}

// The constants of a tile, one channel and one token for each thread. They are fetched before the
// sums are made and put into shared memory after.
template <class Tile>
struct Constants {
  float scale = 0.f, zero = 0.f, bias = 0.f, x_scale = 0.f;
  int32_t row_sum = 0;

  template <class Problem>
  __device__ void fetch(const Problem& p, TilePosition at, int thread) {
    const int in_expert = at.n * Tile::kChannels + thread;
    if (thread < Tile::kChannels && in_expert < p.n) {
      const int channel = expert_of(p, at.m) * p.n + in_expert;
      scale = __ldg(p.channel_scale + channel);
      if (p.channel_zero != nullptr) zero = __ldg(p.channel_zero + channel);
      bias = load_bias(p, channel);
    }
    const int token = at.m * Tile::kTokens + thread;
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

// Adds this block's share of a tile, `share` of p.steps, to those of other blocks in the slot of
// the workspace that the tile has. Returns true in the block that completes the sum, which then
// holds it in its registers. `is_last` is in shared memory; all kThreads threads call, those that
// have values are active.
template <class Tile, int kThreads, int kCount>
__device__ bool add_to_shared_tile(int32_t* values, bool is_active, const Params& p, int slot,
                                   int share, int* is_last) {
  const int thread = threadIdx.x;
  int32_t* sums = p.workspace + kCounters + static_cast<int64_t>(slot) * Tile::kTileInts + thread;
  if (is_active) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) ptx::red_add(sums + i * kThreads, values[i]);
  }

  ptx::named_barrier_sync(1, kThreads);
  if (thread == 0) *is_last = ptx::atomic_add_acq_rel(p.workspace + slot, share) + share == p.steps;
  __syncwarp();
  ptx::named_barrier_sync(1, kThreads);
  if (!*is_last) return false;

  if (thread == 0) p.workspace[slot] = 0;
  if (is_active) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = __ldcg(sums + i * kThreads);
#pragma unroll
    for (int i = 0; i < kCount; ++i) __stcg(sums + i * kThreads, 0);
  }
  return true;
}

// Computes in the order of `reference.epilogue`, without fused multiply-adds.
template <Weights kWeights>
__device__ inline float epilogue(int32_t sum, float x_scale, int32_t row_sum, float scale,
                                 float zero, float bias, bool has_bias) {
  if constexpr (kHasGroups<kWeights>) sum -= 128 * row_sum;
  float y = __fmul_rn(__int2float_rn(sum), scale);
  if constexpr (!kHasGroups<kWeights>) y = __fsub_rn(y, __fmul_rn(__int2float_rn(row_sum), zero));
  y = __fmul_rn(y, x_scale);
  return has_bias ? __fadd_rn(y, bias) : y;
}

}  // namespace qoq::w4a8
