// A page of the quantized KV cache: N tokens of one KV head in one piece
// (vllm_qoq/numerics/kv_layout.py).
//
//   K codes    N rows of K::kRow bytes. In 4 bits the even channel of two is in the low nibble.
//   V codes    N / 2 rows of 2 V::kRow bytes, each a pair of tokens, whose 16-bit units alternate,
//              so that a 32-bit word holds the same channels of both. Row j is rotated by
//              32 (j % 4) bytes, so that threads that read rows j..j + 3 meet no bank twice.
//   K scales   N x (fp16 scale, fp16 zero)
//   V scales   the same
//
// A code stands for scale (code - zero).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace qoq::kv {

// vllm_qoq/numerics/kv_layout.py has the same two numbers.
constexpr int kTokenMultiple = 16;  // a page's tokens are a multiple of it
constexpr int kScaleBytes = 4;      // scale and zero of one token

__host__ __device__ constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

// The codes of a token's key, or of its value.
template <int kHeadSize, int kBitsValue>
struct Codes {
  static constexpr int kBits = kBitsValue;
  static constexpr int kRow = kHeadSize * kBits / 8;
  static constexpr int kLevels = (1 << kBits) - 1;
  static_assert(kBits == 4 || kBits == 8);
};

template <int kHeadSizeValue, int kKeyBits, int kValueBits>
struct Page {
  static constexpr int kHeadSize = kHeadSizeValue;
  using K = Codes<kHeadSize, kKeyBits>;
  using V = Codes<kHeadSize, kValueBits>;
  static constexpr int kTokenBytes = K::kRow + V::kRow + 2 * kScaleBytes;
  static constexpr bool kCanRotate = (kHeadSize & (kHeadSize - 1)) == 0;
  static_assert(kHeadSize % 32 == 0, "a rotation by 32 bytes, pieces of 16");

  // Where a token's part of each of the four begins, in a page of `tokens`.
  __host__ __device__ static constexpr int k_codes(int token) { return token * K::kRow; }
  __host__ __device__ static constexpr int v_codes(int tokens, int token) {
    return tokens * K::kRow + token * V::kRow;
  }
  __host__ __device__ static constexpr int k_scales(int tokens, int token) {
    return tokens * (K::kRow + V::kRow) + token * kScaleBytes;
  }
  __host__ __device__ static constexpr int v_scales(int tokens, int token) {
    return tokens * (K::kRow + V::kRow) + (tokens + token) * kScaleBytes;
  }

  // Where byte `i` of a token's V codes lies in the row of its pair.
  __host__ __device__ static constexpr int v_byte(int token, int i) {
    const int offset = i / 2 * 4 + token % 2 * 2 + i % 2;
    return (offset + 32 * (token / 2 % 4)) % (2 * V::kRow);
  }
};

}  // namespace qoq::kv
