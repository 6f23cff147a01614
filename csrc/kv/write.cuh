// Quantizes keys and values of new tokens into their pages, bit for bit as
// vllm_qoq/numerics/kv_layout.py.
#pragma once

#include "common/ptx.cuh"
#include "kv/floats.cuh"
#include "kv/hadamard.cuh"
#include "kv/page.h"

namespace qoq::kv {

constexpr int kWriteThreads = 256;
// Threads that write one KV head of a token, and channels of a thread. Of 96 channels the last
// threads have none: their group of 32 is that of 128, so that shuffles go over powers of two.
template <class P>
constexpr int kWriteLanes = P::kHeadSize == 64 ? 16 : 32;
template <class P>
constexpr int kWriteChannels = P::kHeadSize <= 128 ? 4 : P::kHeadSize / 32;
// vllm_qoq/numerics/kv_layout.py has the same numbers. A smaller scale would not be a normal fp16.
// A smaller range, relative to the largest magnitude, would make the zero larger than 2^15.
constexpr float kLargest = 65504;  // of fp16
constexpr double kSmallestScale = 6.2e-5;
template <class Codes>
constexpr float kSmallestRange = Codes::kBits == 4 ? 1.f / 1024 : 1.f / 128;

struct WriteParams {
  const void *key, *value;  // [tokens, KV heads, head size]
  const int64_t* slots;     // page * page_tokens + place in it; outside of the cache: not written
  const float* k_mean;      // [KV heads, head size], subtracted from every key, or null
  uint8_t* cache;
  int64_t key_stride, key_head_stride, value_stride, value_head_stride;  // in elements
  int64_t block_stride, head_stride;                                     // of the cache, in bytes
  int64_t slot_count;                                                    // of the cache
  int tokens, kv_heads, page_tokens;
  bool is_bfloat16, is_rotated;
};

// Codes, each in a byte, and the scale and zero that a group of threads shares.
template <int kChannels>
struct Quantized {
  uint32_t codes[kChannels / 4], parameters;
};

// `has_channels` is false for threads of the group whose x says nothing.
template <class Codes, int kLanes, int kChannels>
__device__ inline Quantized<kChannels> quantize(const float (&x)[kChannels], bool has_channels) {
  constexpr float kLevels = Codes::kLevels;
  constexpr auto kLeastRange = static_cast<float>(kSmallestScale * Codes::kLevels);
  float low = kLargest, high = -kLargest, clamped[kChannels];
  bool is_nan = false;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    clamped[i] = fminf(fmaxf(x[i], -kLargest), kLargest);
    is_nan |= x[i] != x[i];
    if (!has_channels) continue;
    low = fminf(low, clamped[i]);
    high = fmaxf(high, clamped[i]);
  }
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    low = fminf(low, __shfl_xor_sync(0xFFFFFFFF, low, step));
    high = fmaxf(high, __shfl_xor_sync(0xFFFFFFFF, high, step));
    is_nan |= __shfl_xor_sync(0xFFFFFFFF, static_cast<int>(is_nan), step) != 0;
  }
  const float size = fmaxf(-low, high);  // the largest magnitude
  float range = __fsub_rn(high, low);
  range = fmaxf(range, fmaxf(size * kSmallestRange<Codes>, kLeastRange));
  float zero = __fdiv_rn(__fmul_rn(-kLevels, low), range);
  const float inverse = __fmul_rn(__frcp_rn(range), kLevels);  // torch's `levels / range`
  float scale = __fdiv_rn(range, kLevels);
  // Minimum and maximum ignore a NaN, which has to stay.
  if (is_nan) scale = zero = __uint_as_float(0x7FC00000);
  Quantized<kChannels> q = {{}, ptx::convert_to_half2(scale, zero)};
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const float code = rintf(__fadd_rn(__fmul_rn(clamped[i], inverse), zero));
    q.codes[i / 4] |= static_cast<uint32_t>(fminf(fmaxf(code, 0.f), kLevels)) << 8 * (i % 4);
  }
  return q;
}

template <int kChannels>
__device__ inline void read_channels(float (&x)[kChannels], const void* from, int64_t at,
                                     bool is_bfloat16) {
#pragma unroll
  for (int i = 0; i < kChannels; i += 4) {
    const uint2 four =
        __ldcg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(from) + at + i));
    const float2 low = to_float2(four.x, is_bfloat16), high = to_float2(four.y, is_bfloat16);
    x[i] = low.x, x[i + 1] = low.y, x[i + 2] = high.x, x[i + 3] = high.y;
  }
}

template <int kChannels>
__device__ inline void subtract(float (&x)[kChannels], const float* mean) {
#pragma unroll
  for (int i = 0; i < kChannels; i += 4) {
    const float4 m = __ldg(reinterpret_cast<const float4*>(mean + i));
    x[i] = __fsub_rn(x[i], m.x), x[i + 1] = __fsub_rn(x[i + 1], m.y);
    x[i + 2] = __fsub_rn(x[i + 2], m.z), x[i + 3] = __fsub_rn(x[i + 3], m.w);
  }
}

// kWriteLanes neighbouring threads write one KV head of a token.
template <class P>
__global__ void __launch_bounds__(kWriteThreads)
    kv_write_kernel(const __grid_constant__ WriteParams p) {
  constexpr int kLanes = kWriteLanes<P>, kChannels = kWriteChannels<P>;
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  const int group = (blockIdx.x * kWriteThreads + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes, token = group / p.kv_heads;
  const int head = group - token * p.kv_heads;
  const int64_t slot = token < p.tokens ? __ldcg(p.slots + token) : -1;
  const bool is_written = slot >= 0 && slot < p.slot_count;
  const bool has_channels = lane * kChannels < P::kHeadSize;
  float k[kChannels] = {}, v[kChannels] = {};
  if (is_written && has_channels) {
    const int channel = lane * kChannels;
    read_channels(k, p.key, token * p.key_stride + head * p.key_head_stride + channel,
                  p.is_bfloat16);
    read_channels(v, p.value, token * p.value_stride + head * p.value_head_stride + channel,
                  p.is_bfloat16);
    if (p.k_mean != nullptr) subtract(k, p.k_mean + head * P::kHeadSize + channel);
  }
  if constexpr (P::kCanRotate) {
    if (p.is_rotated) rotate_normalized<kLanes>(k);
  }
  const auto key = quantize<typename P::K, kLanes>(k, has_channels);
  const auto value = quantize<typename P::V, kLanes>(v, has_channels);
  if (!is_written || !has_channels) return;

  const int64_t page = slot / p.page_tokens;
  const int place = static_cast<int>(slot - page * p.page_tokens), tokens = p.page_tokens;
  uint8_t* base = p.cache + page * p.block_stride + head * p.head_stride;
  uint8_t* k_row = base + P::k_codes(place);
  uint8_t* v_row = base + P::v_codes(tokens, place / 2 * 2);
  auto store_2 = [](uint8_t* at, uint32_t v) {
    *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(v);
  };
  // Two bytes of nibbles from four bytes: the first of two codes is the low nibble.
  auto nibbles = [](uint32_t codes) {
    const uint32_t pairs = codes | codes >> 4;
    return (pairs & 0xFF) | (pairs >> 8 & 0xFF00);
  };
#pragma unroll
  for (int i = 0; i < kChannels / 4; ++i) {
    const int four = lane * (kChannels / 4) + i;
    if constexpr (P::K::kBits == 4) {
      store_2(k_row + 2 * four, nibbles(key.codes[i]));
    } else {
      *reinterpret_cast<uint32_t*>(k_row + 4 * four) = key.codes[i];
    }
    if constexpr (P::V::kBits == 4) {
      store_2(v_row + P::v_byte(place, 2 * four), nibbles(value.codes[i]));
    } else {
      store_2(v_row + P::v_byte(place, 4 * four), value.codes[i]);
      store_2(v_row + P::v_byte(place, 4 * four + 2), value.codes[i] >> 16);
    }
  }
  if (lane == 0) {
    *reinterpret_cast<uint32_t*>(base + P::k_scales(tokens, place)) = key.parameters;
    *reinterpret_cast<uint32_t*>(base + P::v_scales(tokens, place)) = value.parameters;
  }
}

}  // namespace qoq::kv
