// Reads keys and values of tokens back from the cache, for attention over several query tokens of a
// sequence.
#pragma once

#include "common/ptx.cuh"
#include "kv/floats.cuh"
#include "kv/hadamard.cuh"
#include "kv/page.h"

namespace qoq::kv {

constexpr int kDequantizeThreads = 256;
constexpr int kDequantizeRows = 16;     // of a block of threads
constexpr int kDequantizeChannels = 8;  // of a thread

struct DequantizeParams {
  const uint8_t* cache;
  const int32_t* block_table;
  const int32_t* first_token;  // [sequences]: the first one that is wanted
  const int32_t* row_start;    // [sequences + 1]: the output's rows of each sequence
  void *key, *value;           // [rows, KV heads, head size]
  int64_t key_stride, key_head_stride, value_stride, value_head_stride;  // in elements
  int64_t block_stride, head_stride;                                     // of the cache, in bytes
  int64_t table_stride;
  int sequences, kv_heads, page_tokens, max_tokens, rows;
  bool is_bfloat16, is_rotated;
};

// Where the token of a row lies; `page` is -1 for rows that belong to no sequence.
struct Place {
  int page, token;
};

__device__ inline Place place_of(const DequantizeParams& p, int row) {
  if (row < __ldcg(p.row_start) || row >= __ldcg(p.row_start + p.sequences)) return {-1, 0};
  int low = 0, high = p.sequences;  // the last sequence that begins at `row` or before
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (__ldcg(p.row_start + middle) <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int token = __ldcg(p.first_token + low) + row - __ldcg(p.row_start + low);
  if (token < 0 || token >= p.max_tokens) return {-1, 0};
  const int index = token / p.page_tokens;
  return {__ldcg(p.block_table + low * p.table_stride + index), token - index * p.page_tokens};
}

// Eight codes, the first in the lowest bits: one word of 4 bits, or two of 8.
template <class Codes>
__device__ inline void dequantize(float (&x)[kDequantizeChannels], uint2 codes,
                                  uint32_t parameters) {
  const float scale = scale_of(parameters), zero = zero_of(parameters);
#pragma unroll
  for (int i = 0; i < kDequantizeChannels; ++i) {
    constexpr int kBits = Codes::kBits;
    const uint32_t word = kBits == 4 || i < 4 ? codes.x : codes.y;
    const uint32_t code = word >> kBits * (kBits == 4 ? i : i % 4) & Codes::kLevels;
    x[i] = __fmul_rn(scale, __fsub_rn(static_cast<float>(code), zero));
  }
}

__device__ inline void write_channels(void* to, int64_t at, const float (&x)[kDequantizeChannels],
                                      bool is_bfloat16) {
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(to) + at) = {
      to_pair(x[0], x[1], is_bfloat16), to_pair(x[2], x[3], is_bfloat16),
      to_pair(x[4], x[5], is_bfloat16), to_pair(x[6], x[7], is_bfloat16)};
}

template <class T>
__device__ inline T load(const uint8_t* at) {
  return __ldcg(reinterpret_cast<const T*>(at));
}

// A block of threads reads kDequantizeRows rows of all KV heads.
template <class P>
__global__ void __launch_bounds__(kDequantizeThreads)
    kv_dequantize_kernel(const __grid_constant__ DequantizeParams p) {
  // Of 96 channels the last lanes have none: their group of 16 is that of 128.
  constexpr int kLanes = P::kHeadSize == 96 ? 16 : P::kHeadSize / kDequantizeChannels;
  constexpr int kKeyBytes = P::K::kBits, kValueBytes = P::V::kBits;  // of kDequantizeChannels codes
  __shared__ Place places[kDequantizeRows];
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  const int first_row = blockIdx.x * kDequantizeRows;
  if (threadIdx.x < kDequantizeRows) places[threadIdx.x] = place_of(p, first_row + threadIdx.x);
  __syncthreads();
  const int lane = threadIdx.x % kLanes, groups = kDequantizeRows * p.kv_heads;
  // All threads of a warp go round as often: they rotate together.
  for (int base = 0; base < groups; base += kDequantizeThreads / kLanes) {
    const int group = base + threadIdx.x / kLanes;
    const int row = group / p.kv_heads, head = group - row * p.kv_heads;
    const Place place = group < groups ? places[row] : Place{-1, 0};
    const bool has_channels = lane * kDequantizeChannels < P::kHeadSize;
    const bool is_wanted = place.page >= 0 && first_row + row < p.rows && has_channels;
    float k[kDequantizeChannels] = {}, v[kDequantizeChannels] = {};
    if (is_wanted) {
      const uint8_t* page = p.cache + place.page * p.block_stride + head * p.head_stride;
      const int tokens = p.page_tokens, token = place.token;
      const uint8_t* k_codes = page + P::k_codes(token) + lane * kKeyBytes;
      const uint8_t* v_row = page + P::v_codes(tokens, token / 2 * 2);
      // The units of both tokens of the pair; a rotation leaves 32 bytes together.
      const int at = P::v_byte(token / 2 * 2, lane * kValueBytes);
      const uint32_t half = token % 2 == 0 ? 0x5410 : 0x7632;
      uint2 key = {}, value = {};
      if constexpr (P::K::kBits == 4) {
        key.x = load<uint32_t>(k_codes);
      } else {
        key = load<uint2>(k_codes);
      }
      if constexpr (P::V::kBits == 4) {
        const uint2 two = load<uint2>(v_row + at);
        value.x = __byte_perm(two.x, two.y, half);
      } else {
        const uint4 four = load<uint4>(v_row + at);
        value = {__byte_perm(four.x, four.y, half), __byte_perm(four.z, four.w, half)};
      }
      dequantize<typename P::K>(k, key, load<uint32_t>(page + P::k_scales(tokens, token)));
      dequantize<typename P::V>(v, value, load<uint32_t>(page + P::v_scales(tokens, token)));
    }
    if constexpr (P::kCanRotate) {
      if (p.is_rotated) rotate_normalized<kLanes>(k);
    }
    if (!is_wanted) continue;
    const int64_t channel = lane * kDequantizeChannels, to = first_row + row;
    write_channels(p.key, to * p.key_stride + head * p.key_head_stride + channel, k, p.is_bfloat16);
    write_channels(p.value, to * p.value_stride + head * p.value_head_stride + channel, v,
                   p.is_bfloat16);
  }
}

}  // namespace qoq::kv
