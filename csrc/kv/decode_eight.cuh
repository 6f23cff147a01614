// What one warp computes of a tile for up to 8 columns (a query head, for one new token): scores,
// weights (online softmax) and the weighted sum of V.
//
// A lane is 4 g + c. Tokens are the rows of the first product, so that lanes with the same c share
// a column; channels are the rows of the second, whose B operand is the transposed weights. For
// each of the two steps of 16 tokens, at a head size of 128:
//   scores [16 tokens, 8 columns]    = K codes [16, 128]     q [128, 8]
//   sums [128 channels, 8 columns]  += V codes^T [128, 16]   weights [16, 8]
#pragma once

#include <cmath>

#include "kv/decode_tile.cuh"

namespace qoq::kv {

// The sums of columns 2 c and 2 c + 1, for the thread's channels 2 m (+ 1).
template <class A>
struct SumsOfEight : ColumnSums<A::kMultiplies, false> {
  static constexpr int kRunLanes = 1;

  // The column of the thread's j-th part.
  __device__ static int column(int j) { return 2 * (threadIdx.x % 4) + j; }

  // The lane g whose runs of a row of V, which are channels, the thread has.
  __device__ static int run_lane(int) { return threadIdx.x % 32 / 4; }

  __device__ float value(int j, int, int channel) const {
    return this->values[channel / 2][channel % 2 * 2 + j];
  }
};

template <class A>
class TileOfEight : Tile<A> {
 public:
  using Sums = SumsOfEight<A>;

  __device__ TileOfEight(const Params& p, uint32_t address, const Segment<A>& segment, int token)
      : Tile<A>(p, address, segment, token) {}

  __device__ void attend(const Query<A>& query, Sums& sums) const {
    if (is_partial_) this->clear_unseen();
    float scores[kTileSteps][4];
#pragma unroll
    for (int step = 0; step < kTileSteps; ++step) score(step, query, scores[step]);
    if (!is_plain_) {
      if (p_.cap_log2 > 0) cap(query, scores);
      if (is_partial_) hide_unseen(scores);
    }
    uint32_t weights[kTileSteps][2];
    weigh(query, scores, sums, weights);
#pragma unroll
    for (int step = 0; step < kTileSteps; ++step) add_values(step, weights[step], sums);
  }

 private:
  using typename Tile<A>::K;
  using typename Tile<A>::V;
  using Tile<A>::p_;
  using Tile<A>::g_;
  using Tile<A>::c_;
  using Tile<A>::is_partial_;
  using Tile<A>::is_plain_;

  __device__ void hide_unseen(float (&scores)[kTileSteps][4]) const {
#pragma unroll
    for (int step = 0; step < kTileSteps; ++step)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (!this->is_seen_by(Sums::column(j % 2), 16 * step + g_ + j / 2 * 8))
          scores[step][j] = -INFINITY;
  }

  __device__ void cap(const Query<A>& query, float (&scores)[kTileSteps][4]) const {
#pragma unroll
    for (int step = 0; step < kTileSteps; ++step)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        scores[step][j] = this->capped(scores[step][j], query.to_log2[j % 2]);
  }

  // The scores of tokens g and g + 8 of the step, in units of 1 / query.to_log2.
  __device__ void score(int step, const Query<A>& query, float (&scores)[4]) const {
    uint32_t words[2][K::kWords], parameters[2];
    this->load_keys(step, words);
#pragma unroll
    for (int row = 0; row < 2; ++row)
      parameters[row] = ptx::load_shared_4(this->key_scales(step) + (g_ + 8 * row) * kScaleBytes);
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[j] = -zero_of(parameters[j / 2]) * query.sum[j % 2];
#pragma unroll
    for (int w = 0; w < K::kWords; ++w) {
      uint32_t a[2][2 * K::kWordMultiplies];
#pragma unroll
      for (int row = 0; row < 2; ++row) expand<K, false>(words[row][w], a[row]);
#pragma unroll
      for (int e = 0; e < K::kWordMultiplies; ++e)
        ptx::mma_m16n8k16(scores, a[0][2 * e], a[1][2 * e], a[0][2 * e + 1], a[1][2 * e + 1],
                          query.fragments[0][w * K::kWordMultiplies + e]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[j] *= scale_of(parameters[j / 2]);
  }

  // The weights 2^(score - maximum) as the B operand. Where the maximum is new, what was added up
  // before is brought to it.
  __device__ void weigh(const Query<A>& query, const float (&scores)[kTileSteps][4], Sums& sums,
                        uint32_t (&weights)[kTileSteps][2]) const {
    float offset[2], factor[2];
    bool is_larger = false;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float largest = sums.maximum[j];
#pragma unroll
      for (int step = 0; step < kTileSteps; ++step)
        largest = fmaxf(largest, fmaxf(scores[step][j], scores[step][2 + j]));
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
      is_larger |= largest != sums.maximum[j];
      offset[j] = weight_offset<A>(largest, query.to_log2[j], sums.maximum[j], factor[j]);
    }
    if (__any_sync(kAllLanes, is_larger)) {
#pragma unroll
      for (int j = 0; j < 2; ++j) factor[j] = ptx::exp2_approx(factor[j]);
      sums.multiply(factor);
    }
#pragma unroll
    for (int step = 0; step < kTileSteps; ++step) {
      float weight[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        weight[j] = ptx::exp2_approx(fmaf(scores[step][j], query.to_log2[j % 2], offset[j % 2]));
        sums.weights[j % 2] += weight[j];
      }
#pragma unroll
      for (int row = 0; row < 2; ++row)
        weights[step][row] =
            ptx::movmatrix_trans(ptx::convert_to_half2(weight[2 * row], weight[2 * row + 1]));
    }
  }

  __device__ void add_values(int step, const uint32_t (&weights)[2], Sums& sums) const {
    uint32_t words[2][V::kWords], scale[2], zero[2], b[2];
    this->load_values(step, words, scale, zero);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) b[pair] = ptx::multiply_half2(weights[pair], scale[pair]);
    ptx::mma_m16n8k16(sums.zeros, zero[0], zero[0], zero[1], zero[1], b);
#pragma unroll
    for (int w = 0; w < V::kWords; ++w) {
      uint32_t a[2][2 * V::kWordMultiplies];
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) expand<V, true>(words[pair][w], a[pair]);
#pragma unroll
      for (int e = 0; e < V::kWordMultiplies; ++e)
        ptx::mma_m16n8k16(sums.values[w * V::kWordMultiplies + e], a[0][2 * e], a[0][2 * e + 1],
                          a[1][2 * e], a[1][2 * e + 1], b);
    }
  }
};

}  // namespace qoq::kv
