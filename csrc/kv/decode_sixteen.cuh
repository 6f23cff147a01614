// What one warp computes of a tile for up to 16 columns (a query head, for one new token): as in
// decode_eight.cuh, but with columns as the rows of both products.
//
// Lanes with the same g share columns g and g + 8, and what the first product gives is the operand
// of the second as it is. The codes lie in registers as they do there: the two halves of an A
// operand are two B operands. For each of the two steps of 16 tokens, at a head size of 128:
//   scores [16 columns, 16 tokens]    = q [16, 128]         K codes^T [128, 16]
//   sums [16 columns, 128 channels]  += weights [16, 16]    V codes [16, 128]
#pragma once

#include <cmath>

#include "kv/decode_tile.cuh"

namespace qoq::kv {

// The sums of columns g and g + 8, for one channel after the other of the runs of two lanes.
template <class A>
struct SumsOfSixteen : ColumnSums<A::kChannels, true> {
  static constexpr int kRunLanes = 2;

  // The column of the thread's j-th part.
  __device__ static int column(int j) { return threadIdx.x % 32 / 4 + kHeadsOfTile * j; }

  // The q-th lane whose runs of a row of V, which are channels, the thread has.
  __device__ static int run_lane(int q) { return 2 * (threadIdx.x % 4) + q; }

  __device__ float value(int j, int q, int channel) const {
    return this->values[channel][2 * j + q];
  }
};

template <class A>
class TileOfSixteen : Tile<A> {
 public:
  using Sums = SumsOfSixteen<A>;

  __device__ TileOfSixteen(const Params& p, uint32_t address, const Segment<A>& segment, int token)
      : Tile<A>(p, address, segment, token) {}

  __device__ void attend(const Query<A>& query, Sums& sums) const {
    if (is_partial_) this->clear_unseen();
    Scores scores[kTileSteps];
#pragma unroll
    for (int step = 0; step < kTileSteps; ++step) score(step, query, scores[step]);
    if (!is_plain_) {
      if (p_.cap_log2 > 0) cap(query, scores);
      if (is_partial_) hide_unseen(scores);
    }
    uint32_t weights[kTileSteps][4];
    weigh(query, scores, sums, weights);
#pragma unroll
    for (int step = 0; step < kTileSteps; ++step) add_values(step, weights[step], sums);
  }

 private:
  using typename Tile<A>::K;
  using typename Tile<A>::V;
  using Tile<A>::p_;
  using Tile<A>::c_;
  using Tile<A>::is_partial_;
  using Tile<A>::is_plain_;
  // Of a step's tokens 8 n + 2 c and 8 n + 2 c + 1, for column g and then for g + 8.
  using Scores = float[2][4];

  __device__ void hide_unseen(Scores (&scores)[kTileSteps]) const {
#pragma unroll
    for (int step = 0; step < kTileSteps; ++step)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (!this->is_seen_by(Sums::column(j / 2), 16 * step + 8 * n + 2 * c_ + j % 2))
            scores[step][n][j] = -INFINITY;
  }

  __device__ void cap(const Query<A>& query, Scores (&scores)[kTileSteps]) const {
#pragma unroll
    for (int step = 0; step < kTileSteps; ++step)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          scores[step][n][j] = this->capped(scores[step][n][j], query.to_log2[j / 2]);
  }

  // The scores in units of 1 / query.to_log2.
  __device__ void score(int step, const Query<A>& query, Scores& scores) const {
    uint32_t words[2][K::kWords];
    uint2 parameters[2];
    this->load_keys(step, words);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      parameters[n] = ptx::load_shared_8(this->key_scales(step) + (8 * n + 2 * c_) * kScaleBytes);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        scores[n][j] = -zero_of(j % 2 == 0 ? parameters[n].x : parameters[n].y) * query.sum[j / 2];
    }
#pragma unroll
    for (int w = 0; w < K::kWords; ++w)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint32_t halves[2 * K::kWordMultiplies];
        expand<K, false>(words[n][w], halves);
#pragma unroll
        for (int e = 0; e < K::kWordMultiplies; ++e) {
          const int m = w * K::kWordMultiplies + e;
          const auto& first = query.fragments[0][m];
          const auto& second = query.fragments[1][m];
          ptx::mma_m16n8k16(scores[n], first[0], second[0], first[1], second[1],
                            {halves[2 * e], halves[2 * e + 1]});
        }
      }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        scores[n][j] *= scale_of(j % 2 == 0 ? parameters[n].x : parameters[n].y);
  }

  // The weights 2^(score - maximum) as the A operand. Where the maximum is new, what was added up
  // before is brought to it.
  __device__ void weigh(const Query<A>& query, const Scores (&scores)[kTileSteps], Sums& sums,
                        uint32_t (&weights)[kTileSteps][4]) const {
    float offset[2], factor[2];
    bool is_larger = false;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float largest = sums.maximum[j];
#pragma unroll
      for (int step = 0; step < kTileSteps; ++step)
#pragma unroll
        for (int n = 0; n < 2; ++n)
          largest = fmaxf(largest, fmaxf(scores[step][n][2 * j], scores[step][n][2 * j + 1]));
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2)
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
    for (int step = 0; step < kTileSteps; ++step)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float weight[2];
#pragma unroll
          for (int token = 0; token < 2; ++token) {
            weight[token] =
                ptx::exp2_approx(fmaf(scores[step][n][2 * j + token], query.to_log2[j], offset[j]));
            sums.weights[j] += weight[token];
          }
          weights[step][2 * n + j] = ptx::convert_to_half2(weight[0], weight[1]);
        }
  }

  __device__ void add_values(int step, const uint32_t (&weights)[4], Sums& sums) const {
    uint32_t words[2][V::kWords], scale[2], zero[2], a[4];
    this->load_values(step, words, scale, zero);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = ptx::multiply_half2(weights[i], scale[i / 2]);
    ptx::mma_m16n8k16(sums.zeros, a[0], a[1], a[2], a[3], zero);
#pragma unroll
    for (int w = 0; w < V::kWords; ++w) {
      uint32_t halves[2][2 * V::kWordMultiplies];
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) expand<V, true>(words[pair][w], halves[pair]);
#pragma unroll
      for (int e = 0; e < 2 * V::kWordMultiplies; ++e)
        ptx::mma_m16n8k16(sums.values[w * 2 * V::kWordMultiplies + e], a[0], a[1], a[2], a[3],
                          {halves[0][e], halves[1][e]});
    }
  }
};

}  // namespace qoq::kv
