// From the sums of warps to the output: over a block, and over the blocks that share a segment.
#pragma once

#include <type_traits>

#include "kv_decode_tile.cuh"

namespace qoq::kv {

// What is added up, for some channels of one query head: weights and values are relative to
// 2^maximum.
template <int kChannels>
struct Partial {
  float maximum = -INFINITY, weights = 0;
  alignas(16) float values[kChannels] = {};

  // The maximum of all that is added has to be known.
  __device__ void add(float other_maximum, float other_weights, const float* other_values) {
    const float factor = ptx::exp2_approx(other_maximum - maximum);
    weights = fmaf(factor, other_weights, weights);
    add_values(factor, other_values);
  }

  __device__ void add_values(float factor, const float* other_values) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) values[i] = fmaf(factor, other_values[i], values[i]);
  }
};

template <class A>
class Merger {
 public:
  using Vector = Partial<A::kVector>;
  using Channels = std::conditional_t<A::kVector == 4, float4, float2>;
  static_assert(A::kVector * sizeof(float) == sizeof(Channels));

  // `shared` holds kWarps * min(group, kHeadsOfTile) * kPartial floats.
  __device__ Merger(const Params& p, float* shared, int* is_last)
      : p_(p), shared_(shared), is_last_(is_last), heads_(min(p.group, kHeadsOfTile)) {}

  // All threads. The range's part of a segment is complete with these sums of every warp.
  __device__ void finish(const Range& range, const Segment& segment, const Query<A>& query,
                         Sums<A>& sums) {
    const bool is_whole = segment.begin >= range.begin && segment.end() <= range.end;
    // Of a block's segments, only the first can have begun before, and only the last go on.
    const int slot = segment.begin < range.begin ? 0 : 1;
    float* partial = partial_of(blockIdx.x, slot);
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int t = 0; t < A::kHeadTiles; ++t) {
      __syncthreads();  // the one before has been read
      write(t, query, sums);
      __syncthreads();
      for (int head = warp; head < heads_ && t * kHeadsOfTile + head < p_.group; head += kWarps) {
        const Vector v = add_warps(head);
        const int head_of_group = t * kHeadsOfTile + head;
        if (is_whole) {
          write_output(segment, head_of_group, v);
        } else {
          write_partial(partial + head_of_group * A::kPartial, v);
        }
      }
    }
    if (!is_whole) add_blocks(range, segment);
  }

 private:
  __device__ float* partial_of(int block, int slot) const {
    return p_.partials + (int64_t{block} * 2 + slot) * p_.group * A::kPartial;
  }

  __device__ void write(int t, const Query<A>& query, Sums<A>& sums) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float weights = sums.weights[t][j];
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2)
        weights += __shfl_xor_sync(kAllLanes, weights, lanes);
      const int head = 2 * c + j;
      if (head >= heads_) continue;
      float* out = shared_ + (warp * heads_ + head) * A::kPartial;
      auto* channels = reinterpret_cast<float4*>(out + g * A::kChannels);
      auto value = [&](int m, int row) {
        return fmaf(sums.values[t][m][2 * row + j], row == 0 ? 1 / A::kLowUnit : 1 / A::kHighUnit,
                    -sums.zeros[t][j]);
      };
#pragma unroll
      for (int m = 0; m < A::kMultiplies; m += 2)
        channels[m / 2] = {value(m, 0), value(m, 1), value(m + 1, 0), value(m + 1, 1)};
      if (g == 0) {
        out[A::kHeadSize] = sums.maximum[t][j] * query.to_log2[t][j];
        out[A::kHeadSize + 1] = weights;
      }
    }
  }

  __device__ Vector add_warps(int head) const {
    const int channel = threadIdx.x % 32 * A::kVector;
    const float* from = shared_ + head * A::kPartial;
    const int stride = heads_ * A::kPartial;
    Vector sum;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp)
      sum.maximum = fmaxf(sum.maximum, from[warp * stride + A::kHeadSize]);
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const float* other = from + warp * stride;
      sum.add(other[A::kHeadSize], other[A::kHeadSize + 1], other + channel);
    }
    return sum;
  }

  __device__ void write_partial(float* out, const Vector& v) const {
    const int lane = threadIdx.x % 32;
    reinterpret_cast<Channels*>(out)[lane] = *reinterpret_cast<const Channels*>(v.values);
    if (lane == 0) *reinterpret_cast<float2*>(out + A::kHeadSize) = {v.maximum, v.weights};
  }

  // The last block to come adds up the parts, in the order of the blocks.
  __device__ void add_blocks(const Range& range, const Segment& segment) {
    const int first = range.owner(segment.begin), last = range.owner(segment.end() - 1);
    __syncthreads();  // the partial sums of this block are written
    if (threadIdx.x == 0) {
      int32_t* counter = p_.counters + first;
      *is_last_ = ptx::atomic_add_acq_rel(counter, 1) == last - first;
      if (*is_last_) *counter = 0;  // for the next launch
    }
    __syncthreads();
    if (!*is_last_) return;
    for (int head = threadIdx.x / 32; head < p_.group; head += kWarps)
      write_output(segment, head, add_parts(first, last, head));
  }

  // Many loads at a time: the rest of the GPU has nothing left to do while this waits for memory.
  __device__ Vector add_parts(int first, int last, int head) const {
    constexpr int kBatch = 16;
    const int lane = threadIdx.x % 32;
    auto part = [&](int block) {
      return partial_of(block, block == first ? 1 : 0) + head * A::kPartial;
    };
    Vector sum;
    for (int block = first + lane; block <= last; block += 32)
      sum.maximum = fmaxf(sum.maximum, __ldcg(part(block) + A::kHeadSize));
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2)
      sum.maximum = fmaxf(sum.maximum, __shfl_xor_sync(kAllLanes, sum.maximum, lanes));
    for (int base = first; base <= last; base += kBatch) {
      float2 mine = {-INFINITY, 0};  // maximum and weights of part base + lane
      if (lane < kBatch && base + lane <= last)
        mine = __ldcg(reinterpret_cast<const float2*>(part(base + lane) + A::kHeadSize));
      Channels values[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        values[i] = base + i <= last
                        ? __ldcg(reinterpret_cast<const Channels*>(part(base + i)) + lane)
                        : Channels{};
      const float factor = ptx::exp2_approx(mine.x - sum.maximum);
      sum.weights = fmaf(factor, mine.y, sum.weights);  // of every 16th part
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        sum.add_values(__shfl_sync(kAllLanes, factor, i),
                       reinterpret_cast<const float*>(&values[i]));
    }
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2)
      sum.weights += __shfl_xor_sync(kAllLanes, sum.weights, lanes);
    return sum;
  }

  __device__ void write_output(const Segment& segment, int head_of_group, const Vector& v) const {
    const int head = segment.head * p_.group + head_of_group;
    auto* out = static_cast<uint16_t*>(p_.out) + segment.sequence * p_.out_stride +
                head * p_.out_head_stride + threadIdx.x % 32 * A::kVector;
#pragma unroll
    for (int i = 0; i < A::kVector; i += 2) {
      const float first = v.values[i] / v.weights, second = v.values[i + 1] / v.weights;
      *reinterpret_cast<uint32_t*>(out + i) = to_pair(first, second, p_.is_bfloat16);
    }
  }

  const Params& p_;
  float* shared_;
  int* is_last_;
  const int heads_;
};

}  // namespace qoq::kv
