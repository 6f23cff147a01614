// A tile of 32 tokens in shared memory: which of them are seen, and their codes as operands of the
// mma. What is computed of it is in decode_eight.cuh and decode_sixteen.cuh.
#pragma once

#include <cmath>

#include "common/mma.cuh"
#include "common/ptx.cuh"
#include "kv/decode_query.cuh"

namespace qoq::kv {

// The codes of a word as pairs of fp16 with the value code * 2^-24, or code * 2^-20 in pairs 1 and
// 3 of 4 bits. For K, every two pairs are the a0 and a2 of one mma.
//   4 bits         nibbles (0, 4), (1, 5), (2, 6), (3, 7) of the word
//   8 bits of K    bytes (0, 1), (2, 3)
//   8 bits of V    bytes (0, 2), (1, 3): the low 16 bits are one token and the high ones the next
template <class Codes, bool kIsValue>
__device__ inline void expand(uint32_t word, uint32_t (&halves)[2 * Codes::kWordMultiplies]) {
  if constexpr (Codes::kBits == 4) {
    halves[0] = word & 0x000F000F;
    halves[1] = word & 0x00F000F0;
    const uint32_t upper = word >> 8;
    halves[2] = upper & 0x000F000F;
    halves[3] = upper & 0x00F000F0;
  } else {
    halves[0] = __byte_perm(word, 0, kIsValue ? 0x4240 : 0x4140);
    halves[1] = __byte_perm(word, 0, kIsValue ? 0x4341 : 0x4342);
  }
}

// Loads kWords words in pieces of kPieceBytes, `stride` apart.
template <int kWords, int kPieceBytes>
__device__ inline void load_words(uint32_t* words, uint32_t address, int stride) {
#pragma unroll
  for (int i = 0; i < kWords; i += kPieceBytes / 4, address += stride) {
    if constexpr (kPieceBytes == 4) {
      words[i] = ptx::load_shared_4(address);
    } else if constexpr (kPieceBytes == 8) {
      const uint2 v = ptx::load_shared_8(address);
      words[i] = v.x, words[i + 1] = v.y;
    } else {
      const uint4 v = ptx::load_shared_16(address);
      words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
    }
  }
}

// What a warp has added up in a segment, of which a thread has two columns: `kCount` of the
// products of weights and values, in the accumulators of an mma. Columns are the rows of that, or
// its columns.
template <int kCount, bool kAreRows>
struct ColumnSums {
  float values[kCount][4];
  float zeros[4];  // sums of weight * scale * zero, in two copies
  float maximum[2], weights[2];

  // Which of the two columns an accumulator is of.
  __device__ static constexpr int part_of(int j) { return kAreRows ? j / 2 : j % 2; }

  __device__ void clear() {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      zeros[j] = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i][j] = 0;
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      maximum[j] = -INFINITY;
      weights[j] = 0;
    }
  }

  __device__ void multiply(const float (&factor)[2]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      zeros[j] *= factor[part_of(j)];
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i][j] *= factor[part_of(j)];
    }
    for (int j = 0; j < 2; ++j) weights[j] *= factor[j];
  }

  __device__ float zero(int j) const { return zeros[kAreRows ? 2 * j : j]; }

  // The weights of the j-th column over all tokens, of which the lanes that share it have some.
  __device__ float all_weights(int j) const {
    float sum = weights[j];
#pragma unroll
    for (int lanes = kAreRows ? 1 : 4; lanes < (kAreRows ? 4 : 32); lanes *= 2)
      sum += __shfl_xor_sync(kAllLanes, sum, lanes);
    return sum;
  }
};

// Brings `maximum` to the new one, `largest`, and returns what is added to scores in units of
// log2 so that the weight of the largest is 2^kWeightExponent. `factor` is the power of two by
// which what was added up before is multiplied.
template <class A>
__device__ inline float weight_offset(float largest, float to_log2, float& maximum, float& factor) {
  // Of several queries, one may not have seen a token yet.
  const float base = A::kHasManyQueries && largest == -INFINITY ? 0 : largest;
  factor = (maximum - base) * to_log2;
  maximum = largest;
  return A::kWeightExponent - base * to_log2;
}

// A tile in shared memory: `address` is its stage, and `token` the first of its tokens, from which
// others are counted. Tokens outside of [first_seen_, end_seen_) are not seen, and what is stored
// of them may be anything. A lane is 4 g + c.
template <class A>
class Tile {
 protected:
  using K = typename A::K;
  using V = typename A::V;

  __device__ Tile(const Params& p, uint32_t address, const Segment<A>& segment, int token)
      : p_(p),
        segment_(segment),
        address_(address),
        g_(threadIdx.x % 32 / 4),
        c_(threadIdx.x % 4),
        first_seen_(segment.first_token(p) - token),
        end_seen_(segment.length - token),
        is_partial_(is_hidden_from_some()),
        is_plain_(!is_partial_ && p.cap_log2 == 0) {}

  // Writes 0 over the scales and zeros of tokens that are not seen, which may be NaN.
  __device__ void clear_unseen() const {
    const int token = threadIdx.x % 32, step = token / 16;
    const uint32_t scales = address_ + step * p_.scale_step_bytes + token % 16 * kScaleBytes;
    if (!is_seen(token)) {
      ptx::store_shared_4(scales + p_.k_scale_offset, 0);
      ptx::store_shared_4(scales + p_.v_scale_offset, 0);
      if constexpr (ptx::kHasCopyEngine) ptx::fence_proxy_async_shared();  // it writes there next
    }
    __syncwarp();
  }

  // Whether a column sees a token.
  __device__ bool is_seen_by(int column, int token) const {
    if constexpr (!A::kHasManyQueries) return is_seen(token);
    const int end = end_of_first() + column_of<A>(p_, segment_, column).token;
    const int first = p_.window > 0 ? end - p_.window : 0;
    return token >= first && token < end;
  }

  // cap * tanh(score / cap), from tanh(y) = 1 - 2 / (1 + e^2y), which is right to 2^-22 of the cap.
  __device__ float capped(float score, float to_log2) const {
    const float largest = p_.cap_log2 * ptx::reciprocal_approx(to_log2);
    const float power = ptx::exp2_approx(score * (p_.cap_exponent * to_log2));
    return fmaf(-2 * largest, ptx::reciprocal_approx(1 + power), largest);
  }

  // The codes of K of tokens g and g + 8 of a step, an eighth or a fourth of their channels.
  __device__ void load_keys(int step, uint32_t (&words)[2][K::kWords]) const {
    const uint32_t codes = address_ + step * p_.step_bytes + g_ * K::kRow + c_ * K::kPieceBytes;
#pragma unroll
    for (int row = 0; row < 2; ++row)
      load_words<K::kWords, K::kPieceBytes>(words[row], codes + row * 8 * K::kRow,
                                            4 * K::kPieceBytes);
  }

  // Where the scales and zeros of K of a step are.
  __device__ uint32_t key_scales(int step) const {
    return address_ + p_.k_scale_offset + step * p_.scale_step_bytes;
  }

  // The codes of V of token pairs c and c + 4 of a step, an eighth of their channels, and the
  // scales and zeros of each pair.
  __device__ void load_values(int step, uint32_t (&words)[2][V::kWords], uint32_t (&scale)[2],
                              uint32_t (&zero)[2]) const {
    const int step_bytes = K::kRow == V::kRow ? p_.step_bytes : p_.v_step_bytes;
    const uint32_t rows = address_ + p_.v_offset + step * step_bytes + c_ * 2 * V::kRow;
    const uint32_t scales = address_ + p_.v_scale_offset + step * p_.scale_step_bytes;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
      for (int run = 0; run < V::kRuns; ++run) {
        const int at = ((8 * run + g_) * V::kRunBytes + 32 * c_) % (2 * V::kRow);
        load_words<V::kRunBytes / 4, V::kPieceBytes>(
            words[pair] + run * (V::kRunBytes / 4), rows + pair * 8 * V::kRow + at, V::kPieceBytes);
      }
      const uint2 two = ptx::load_shared_8(scales + (c_ + 4 * pair) * 2 * kScaleBytes);
      scale[pair] = __byte_perm(two.x, two.y, 0x5410);
      zero[pair] = __byte_perm(two.x, two.y, 0x7632);
    }
  }

 private:
  // Whether any query sees a token.
  __device__ bool is_seen(int token) const { return token >= first_seen_ && token < end_seen_; }

  // Where the tokens end that the first query sees; each further one sees one more.
  __device__ int end_of_first() const { return end_seen_ - (segment_.count - 1); }

  __device__ bool is_hidden_from_some() const {
    if constexpr (A::kHasManyQueries) {
      const bool has_left = p_.window > 0 && end_seen_ > p_.window;  // the window of the last query
      return has_left || end_of_first() < kTileTokens;
    }
    return first_seen_ > 0 || end_seen_ < kTileTokens;
  }

 protected:
  const Params& p_;
  const Segment<A>& segment_;
  const uint32_t address_;
  const int g_, c_, first_seen_, end_seen_;
  const bool is_partial_;  // whether a query does not see all of its tokens
  const bool is_plain_;    // neither that nor capped
};

}  // namespace qoq::kv
