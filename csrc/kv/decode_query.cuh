// Query heads as an operand of the mma, in fp16 with one power of two for each head.
#pragma once

#include "kv/decode_work.cuh"
#include "kv/floats.cuh"
#include "kv/hadamard.cuh"

namespace qoq::kv {

// Up to 8 query heads in each head tile, where lane = 4 g + c; fragments hold head g of each. Where
// sequences have several new tokens, a head is a column of the segment (`column_of`). With them, a
// score is
//   scale of the token * (sum of query * code - zero * sum of query) * to_log2
// The last two are of the columns of the thread's scores: 2 c and 2 c + 1 of one head tile, or
// head g of each of two.
template <class A>
struct Query {
  using K = typename A::K;
  static constexpr int kRaw = A::kHeadSize / 16;  // loads of a thread, of 4 channels each
  uint32_t fragments[A::kHeadTiles][A::kMultiplies][2];
  float sum[2], to_log2[2];

  __device__ void set(const Params& p, const uint2 (&raw)[A::kHeadTiles][kRaw]) {
#pragma unroll
    for (int t = 0; t < A::kHeadTiles; ++t) set_head_tile(p, raw[t], t);
  }

  // Reads the query of a segment, and zeros for heads that the group lacks. It is to be issued
  // before many copies, behind which it would wait.
  __device__ static void fetch(const Params& p, const Segment<A>& segment,
                               uint2 (&raw)[A::kHeadTiles][kRaw]) {
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int t = 0; t < A::kHeadTiles; ++t) {
      const Column column = column_of<A>(p, segment, t * kHeadsOfTile + g);
      const auto* q = static_cast<const uint16_t*>(p.q) +
                      row_of<A>(segment, column.token) * p.q_stride + column.head * p.q_head_stride;
#pragma unroll
      for (int i = 0; i < kRaw; ++i) {
        // Thread c has the c-th of 4 pieces of a K row, and likewise of the second 4, if any.
        constexpr int kPieceRaw = K::kPieceBytes * 8 / K::kBits / 4;
        const int from = ((i / kPieceRaw * 4 + c) * kPieceRaw + i % kPieceRaw) * 4;
        raw[t][i] = column.is_there ? __ldcg(reinterpret_cast<const uint2*>(q + from)) : uint2{};
      }
    }
  }

 private:
  static constexpr int kWordChannels = 32 / K::kBits;

  __device__ void set_head_tile(const Params& p, const uint2 (&raw)[kRaw], int t) {
    const int c = threadIdx.x % 4;
    float values[4 * kRaw];
    auto convert = [&](bool is_bfloat16) {
#pragma unroll
      for (int i = 0; i < kRaw; ++i) {
        const float2 low = to_float2(raw[i].x, is_bfloat16),
                     high = to_float2(raw[i].y, is_bfloat16);
        values[4 * i] = low.x, values[4 * i + 1] = low.y;
        values[4 * i + 2] = high.x, values[4 * i + 3] = high.y;
      }
    };
    if (p.is_bfloat16) {
      convert(true);
    } else {
      convert(false);
    }
    if constexpr (A::kCanRotate) {
      if (p.is_rotated) rotate<4>(values);
    }
    // Magnitudes are compared as integers, so that NaN is the largest of all.
    uint32_t largest = 0;
    float total = 0;
#pragma unroll
    for (const float v : values) {
      largest = max(largest, __float_as_uint(v) & 0x7FFFFFFF);
      total += v;
    }
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      largest = max(largest, __shfl_xor_sync(kAllLanes, largest, step));
      total += __shfl_xor_sync(kAllLanes, total, step);
    }
    // 2^(kQueryExponent - exponent of the largest), and its inverse. The limits keep both normal.
    const int exponent = min(max(static_cast<int>(largest >> 23), 20), 240);
    const float factor = __uint_as_float((127 + A::kQueryExponent + 127 - exponent) << 23);
    const float inverse = __uint_as_float((exponent - A::kQueryExponent) << 23);
    constexpr float kLowFactor = K::kHighUnit / K::kLowUnit;  // the unit of both is kHighUnit
#pragma unroll
    for (int w = 0; w < K::kWords; ++w) {
      const float* v = values + w * kWordChannels;
#pragma unroll
      for (int e = 0; e < K::kWordMultiplies; ++e) {
        auto& b = fragments[t][w * K::kWordMultiplies + e];
        if constexpr (K::kBits == 4) {
          b[0] = ptx::convert_to_half2(v[2 * e] * factor * kLowFactor,
                                       v[2 * e + 4] * factor * kLowFactor);
          b[1] = ptx::convert_to_half2(v[2 * e + 1] * factor, v[2 * e + 5] * factor);
        } else {
          b[0] = ptx::convert_to_half2(v[0] * factor, v[1] * factor);
          b[1] = ptx::convert_to_half2(v[2] * factor, v[3] * factor);
        }
      }
    }
    total *= factor * K::kHighUnit;
    const float head_to_log2 = inverse * (p.scale_log2 / K::kHighUnit);
    if constexpr (A::kHeadTiles > 1) {
      sum[t] = total;
      to_log2[t] = head_to_log2;
    } else {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        sum[j] = __shfl_sync(kAllLanes, total, 4 * (2 * c + j));
        to_log2[j] = __shfl_sync(kAllLanes, head_to_log2, 4 * (2 * c + j));
      }
    }
  }
};

}  // namespace qoq::kv
