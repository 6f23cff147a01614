// From the sums of warps to the output: over a block, and over the blocks that share a segment.
#pragma once

#include <type_traits>

#include "kv/decode_tile.cuh"

namespace qoq::kv {

// The sums for some channels of one query head. Weights and values are relative to 2^maximum.
template <int kChannels>
struct Partial {
  float maximum = -INFINITY, weights = 0;
  alignas(16) float values[kChannels] = {};

  // `maximum` has to be that of all that is added.
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
using Vector = Partial<A::kVector>;
template <class A>
using Channels = std::conditional_t<A::kVector == 4, float4, float2>;

// Adds up what `count` blocks have for one head. `parts` is slot 0 of the first block; that block's
// part is in its slot 1, `slot` floats on, and the parts of the others are in their slots 0.
//
// The rest of the GPU has nothing left to do while this waits for memory, and a warp that is alone
// takes about 5 cycles for an instruction. So every quarter of the warp takes another part, and the
// first loads are under way before the maximum is known.
template <class A>
__device__ inline Vector<A> add_parts(const float* parts, int count, int slot) {
  constexpr int kQuarters = 4, kBatch = 4;  // kBatch: the parts that a quarter takes at a time
  const int lane = threadIdx.x % 32, quarter = lane / 8;
  auto part = [&](int i) { return parts + (i == 0 ? 1 : 2 * i) * slot; };
  // Maximum and weights.
  auto load_numbers = [&](int i) {
    return i < count ? __ldcg(reinterpret_cast<const float2*>(part(i) + A::kHeadSize))
                     : float2{-INFINITY, 0};
  };
  float2 numbers[kBatch];
  Channels<A> values[kBatch][kQuarters];
  auto load = [&](int base) {
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = base + k * kQuarters + quarter;
      numbers[k] = load_numbers(i);
#pragma unroll
      for (int j = 0; j < kQuarters; ++j)
        values[k][j] =
            i < count ? __ldcg(reinterpret_cast<const Channels<A>*>(part(i)) + 8 * j + lane % 8)
                      : Channels<A>{};
    }
  };
  load(0);
  float maximum = -INFINITY;
#pragma unroll 1
  for (int i = lane; i < count; i += 32) maximum = fmaxf(maximum, load_numbers(i).x);
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2)
    maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, lanes));
  float weights = 0, sums[kQuarters][A::kVector] = {};
#pragma unroll 1
  for (int base = 0; base < count;) {
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const float factor = ptx::exp2_approx(numbers[k].x - maximum);
      weights = fmaf(factor, numbers[k].y, weights);
#pragma unroll
      for (int j = 0; j < kQuarters; ++j)
#pragma unroll
        for (int e = 0; e < A::kVector; ++e)
          sums[j][e] = fmaf(factor, reinterpret_cast<const float*>(&values[k][j])[e], sums[j][e]);
    }
    base += kBatch * kQuarters;
    if (base < count) load(base);
  }
  // Adds up over the quarters, each of which keeps the channels of its own lanes.
#pragma unroll
  for (int lanes = 16; lanes >= 8; lanes /= 2) {
    const bool is_upper = lane & lanes;
    weights += __shfl_xor_sync(kAllLanes, weights, lanes);
#pragma unroll
    for (int j = 0; j < lanes / 8; ++j)
#pragma unroll
      for (int e = 0; e < A::kVector; ++e) {
        const float low = sums[j][e], high = sums[j + lanes / 8][e];
        sums[j][e] =
            (is_upper ? high : low) + __shfl_xor_sync(kAllLanes, is_upper ? low : high, lanes);
      }
  }
  Vector<A> sum;
  sum.maximum = maximum;
  sum.weights = weights;
#pragma unroll
  for (int e = 0; e < A::kVector; ++e) sum.values[e] = sums[0][e];
  return sum;
}

// The first and the last segment of a range, in shared memory. Other blocks may have parts of them.
struct Ends {
  Segment segments[2];
  int is_last[2];  // whether this block is the last to come
};

template <class A>
class Merger {
 public:
  static_assert(A::kVector * sizeof(float) == sizeof(Channels<A>));
  static_assert(sizeof(Ends) == A::kEndsBytes);

  // `shared` holds kWarps * min(group, kHeadsOfTile) * kPartial floats.
  // `first` is the segment of the range's first tile.
  __device__ Merger(const Params& p, float* shared, Ends* ends, const Segment& first)
      : p_(p), shared_(shared), ends_(ends), heads_(min(p.group, kHeadsOfTile)) {
    if (threadIdx.x == 0) ends->segments[0] = first;
  }

  // Called by all threads, when the range's part of a segment is complete with these sums of every
  // warp. A segment of which other blocks have parts too is left to add_blocks.
  __device__ void finish(const Range& range, const Segment& segment, const Query<A>& query,
                         Sums<A>& sums) {
    const bool is_whole = is_in(range, segment);
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
        const Vector<A> v = add_warps(head);
        const int head_of_group = t * kHeadsOfTile + head;
        if (is_whole) {
          write_output(segment, head_of_group, v);
        } else {
          write_partial(partial + head_of_group * A::kPartial, v);
        }
      }
    }
  }

  // Called by all threads, once, at the end: only then are registers free for many loads. `last` is
  // the segment of the range's last tile. The last block to come adds up the parts of a segment, in
  // the order of the blocks.
  __device__ void add_blocks(const Range& range, const Segment& last) {
    const int warp = threadIdx.x / 32;
    __syncthreads();  // the partial sums of this block are written
    if (threadIdx.x % 32 == 0 && warp < 2) {
      if (warp == 1) ends_->segments[1] = last;
      const Owners owners = owners_of(range, ends_->segments[warp]);
      const bool is_same = warp == 0 && last.begin == ends_->segments[0].begin;
      bool is_last = false;
      if (owners.first < owners.last && !is_same) {
        int32_t* counter = p_.counters + owners.first;
        is_last = ptx::atomic_add_acq_rel(counter, 1) == owners.last - owners.first;
        if (is_last) *counter = 0;  // for the next launch
      }
      ends_->is_last[warp] = is_last;
    }
    __syncthreads();
#pragma unroll 1  // so that the code is there only once
    for (int i = 0; i < 2; ++i) {
      if (!ends_->is_last[i]) continue;
      const Segment segment = ends_->segments[i];
      const Owners owners = owners_of(range, segment);
      for (int head = warp; head < p_.group; head += kWarps) {
        const float* parts = partial_of(owners.first, 0) + head * A::kPartial;
        const int count = owners.last - owners.first + 1;
        write_output(segment, head, add_parts<A>(parts, count, p_.group * A::kPartial));
      }
    }
  }

 private:
  // The blocks with a segment's tiles.
  struct Owners {
    int first, last;
  };

  __device__ static Owners owners_of(const Range& range, const Segment& segment) {
    return {segment.begin / range.length, (segment.end() - 1) / range.length};
  }

  __device__ static bool is_in(const Range& range, const Segment& segment) {
    return segment.begin >= range.begin && segment.end() <= range.end;
  }

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

  __device__ Vector<A> add_warps(int head) const {
    const int channel = threadIdx.x % 32 * A::kVector;
    const float* from = shared_ + head * A::kPartial;
    const int stride = heads_ * A::kPartial;
    Vector<A> sum;
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

  __device__ void write_partial(float* out, const Vector<A>& v) const {
    const int lane = threadIdx.x % 32;
    reinterpret_cast<Channels<A>*>(out)[lane] = *reinterpret_cast<const Channels<A>*>(v.values);
    if (lane == 0) *reinterpret_cast<float2*>(out + A::kHeadSize) = {v.maximum, v.weights};
  }

  __device__ void write_output(const Segment& segment, int head_of_group,
                               const Vector<A>& v) const {
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
  Ends* ends_;
  const int heads_;
};

}  // namespace qoq::kv
