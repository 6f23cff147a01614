// What one warp computes of a tile of 32 tokens: scores, weights (online softmax) and the weighted
// sum of V.
//
// A lane is 4 g + c. Tokens are the rows of the first product, so that lanes with the same c share
// a query head; channels are the rows of the second, whose B operand is the transposed weights. For
// each of the two steps of 16 tokens, at a head size of 128:
//   scores [16 tokens, 8 heads]    = K codes [16, 128]     q [128, 8]
//   sums [128 channels, 8 heads]  += V codes^T [128, 16]   weights [16, 8]
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

// What a warp has added up in a segment for query heads 2 c and 2 c + 1 of each head tile.
template <class A>
struct Sums {
  float values[A::kHeadTiles][A::kMultiplies][4];  // for the thread's channels 2 m (+ 1)
  float zeros[A::kHeadTiles][4];                   // sums of weight * scale * zero, in two copies
  float maximum[A::kHeadTiles][2], weights[A::kHeadTiles][2];

  __device__ void clear() {
#pragma unroll
    for (int t = 0; t < A::kHeadTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        zeros[t][j] = 0;
#pragma unroll
        for (int m = 0; m < A::kMultiplies; ++m) values[t][m][j] = 0;
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        maximum[t][j] = -INFINITY;
        weights[t][j] = 0;
      }
    }
  }

  __device__ void multiply(int t, const float (&factor)[2]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      zeros[t][j] *= factor[j % 2];
#pragma unroll
      for (int m = 0; m < A::kMultiplies; ++m) values[t][m][j] *= factor[j % 2];
    }
    for (int j = 0; j < 2; ++j) weights[t][j] *= factor[j];
  }
};

// A tile in shared memory: `address` is its stage, and `token` the first of its tokens, from which
// others are counted. Tokens outside of [first_seen_, end_seen_) are not seen, and what is stored
// of them may be anything.
template <class A>
class Tile {
 public:
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

  __device__ void attend(const Query<A>& query, Sums<A>& sums) const {
    if (is_partial_) clear_unseen();
    float scores[A::kHeadTiles][kTileSteps][4];
#pragma unroll
    for (int step = 0; step < kTileSteps; ++step) score(step, query, scores);
    if (!is_plain_) {
      if (p_.cap_log2 > 0) cap(query, scores);
      if (is_partial_) hide_unseen(scores);
    }
    uint32_t weights[A::kHeadTiles][kTileSteps][2];
#pragma unroll
    for (int t = 0; t < A::kHeadTiles; ++t) weigh(t, query, scores[t], sums, weights[t]);
#pragma unroll
    for (int step = 0; step < kTileSteps; ++step) add_values(step, weights, sums);
  }

 private:
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

  __device__ void hide_unseen(float (&scores)[A::kHeadTiles][kTileSteps][4]) const {
    if constexpr (A::kHasManyQueries) {
#pragma unroll
      for (int t = 0; t < A::kHeadTiles; ++t)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int query = column_of<A>(p_, segment_, t * kHeadsOfTile + 2 * c_ + j % 2).token;
          const int end = end_of_first() + query, first = p_.window > 0 ? end - p_.window : 0;
#pragma unroll
          for (int step = 0; step < kTileSteps; ++step) {
            const int token = 16 * step + g_ + j / 2 * 8;
            if (token < first || token >= end) scores[t][step][j] = -INFINITY;
          }
        }
    } else {
#pragma unroll
      for (int step = 0; step < kTileSteps; ++step)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int t = 0; t < A::kHeadTiles; ++t)
            if (!is_seen(16 * step + g_ + j / 2 * 8)) scores[t][step][j] = -INFINITY;
    }
  }

  // cap * tanh(score / cap), from tanh(y) = 1 - 2 / (1 + e^2y), which is right to 2^-22 of the cap.
  __device__ void cap(const Query<A>& query, float (&scores)[A::kHeadTiles][kTileSteps][4]) const {
#pragma unroll
    for (int t = 0; t < A::kHeadTiles; ++t)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float to_log2 = query.to_log2[t][j];
        const float largest = p_.cap_log2 * ptx::reciprocal_approx(to_log2);
        const float to_exponent = p_.cap_exponent * to_log2;
#pragma unroll
        for (int step = 0; step < kTileSteps; ++step)
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            float& score = scores[t][step][2 * row + j];
            const float power = ptx::exp2_approx(score * to_exponent);
            score = fmaf(-2 * largest, ptx::reciprocal_approx(1 + power), largest);
          }
      }
  }

  // The scores of tokens g and g + 8 of the step, in units of 1 / query.to_log2.
  __device__ void score(int step, const Query<A>& query,
                        float (&scores)[A::kHeadTiles][kTileSteps][4]) const {
    using K = typename A::K;
    const uint32_t codes = address_ + step * p_.step_bytes + g_ * K::kRow + c_ * K::kPieceBytes;
    const uint32_t scales = address_ + p_.k_scale_offset + step * p_.scale_step_bytes;
    uint32_t words[2][K::kWords], parameters[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      load_words<K::kWords, K::kPieceBytes>(words[row], codes + row * 8 * K::kRow,
                                            4 * K::kPieceBytes);
      parameters[row] = ptx::load_shared_4(scales + (g_ + 8 * row) * kScaleBytes);
    }
#pragma unroll
    for (int t = 0; t < A::kHeadTiles; ++t)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        scores[t][step][j] = -zero_of(parameters[j / 2]) * query.sum[t][j % 2];
#pragma unroll
    for (int w = 0; w < K::kWords; ++w) {
      uint32_t a[2][2 * K::kWordMultiplies];
#pragma unroll
      for (int row = 0; row < 2; ++row) expand<K, false>(words[row][w], a[row]);
#pragma unroll
      for (int e = 0; e < K::kWordMultiplies; ++e)
#pragma unroll
        for (int t = 0; t < A::kHeadTiles; ++t)
          ptx::mma_m16n8k16(scores[t][step], a[0][2 * e], a[1][2 * e], a[0][2 * e + 1],
                            a[1][2 * e + 1], query.fragments[t][w * K::kWordMultiplies + e]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float scale = scale_of(parameters[j / 2]);
#pragma unroll
      for (int t = 0; t < A::kHeadTiles; ++t) scores[t][step][j] *= scale;
    }
  }

  // The weights 2^(score - maximum) as the B operand. Where the maximum is new, what was added up
  // before is brought to it.
  __device__ void weigh(int t, const Query<A>& query, const float (&scores)[kTileSteps][4],
                        Sums<A>& sums, uint32_t (&weights)[kTileSteps][2]) const {
    float offset[2], factor[2];
    bool is_larger = false;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float largest = sums.maximum[t][j];
#pragma unroll
      for (int step = 0; step < kTileSteps; ++step)
        largest = fmaxf(largest, fmaxf(scores[step][j], scores[step][2 + j]));
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
      is_larger |= largest != sums.maximum[t][j];
      // Of several queries, one may not have seen a token yet.
      const float base = A::kHasManyQueries && largest == -INFINITY ? 0 : largest;
      factor[j] = (sums.maximum[t][j] - base) * query.to_log2[t][j];
      offset[j] = A::kWeightExponent - base * query.to_log2[t][j];
      sums.maximum[t][j] = largest;
    }
    if (__any_sync(kAllLanes, is_larger)) {
#pragma unroll
      for (int j = 0; j < 2; ++j) factor[j] = ptx::exp2_approx(factor[j]);
      sums.multiply(t, factor);
    }
#pragma unroll
    for (int step = 0; step < kTileSteps; ++step) {
      float weight[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        weight[j] = ptx::exp2_approx(fmaf(scores[step][j], query.to_log2[t][j % 2], offset[j % 2]));
        sums.weights[t][j % 2] += weight[j];
      }
#pragma unroll
      for (int row = 0; row < 2; ++row)
        weights[step][row] =
            ptx::movmatrix_trans(ptx::convert_to_half2(weight[2 * row], weight[2 * row + 1]));
    }
  }

  __device__ void add_values(int step, const uint32_t (&weights)[A::kHeadTiles][kTileSteps][2],
                             Sums<A>& sums) const {
    // This lane has token pairs c and c + 4 of the step, and an eighth of their channels.
    using V = typename A::V;
    const int step_bytes = A::K::kRow == V::kRow ? p_.step_bytes : p_.v_step_bytes;
    const uint32_t rows = address_ + p_.v_offset + step * step_bytes + c_ * 2 * V::kRow;
    const uint32_t scales = address_ + p_.v_scale_offset + step * p_.scale_step_bytes;
    uint32_t words[2][V::kWords], scale[2], zero[2];
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
    uint32_t b[A::kHeadTiles][2];
#pragma unroll
    for (int t = 0; t < A::kHeadTiles; ++t) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair)
        b[t][pair] = ptx::multiply_half2(weights[t][step][pair], scale[pair]);
      ptx::mma_m16n8k16(sums.zeros[t], zero[0], zero[0], zero[1], zero[1], b[t]);
    }
#pragma unroll
    for (int w = 0; w < V::kWords; ++w) {
      uint32_t a[2][2 * V::kWordMultiplies];
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) expand<V, true>(words[pair][w], a[pair]);
#pragma unroll
      for (int e = 0; e < V::kWordMultiplies; ++e)
#pragma unroll
        for (int t = 0; t < A::kHeadTiles; ++t)
          ptx::mma_m16n8k16(sums.values[t][w * V::kWordMultiplies + e], a[0][2 * e],
                            a[0][2 * e + 1], a[1][2 * e], a[1][2 * e + 1], b[t]);
    }
  }

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

  const Params& p_;
  const Segment<A>& segment_;
  const uint32_t address_;
  const int g_, c_, first_seen_, end_seen_;
  const bool is_partial_;
  const bool is_plain_;  // neither that nor capped
};

}  // namespace qoq::kv
