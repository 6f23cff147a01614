// From the sums of warps to the output: of a warp that has a whole segment, over the warps of a
// block that share one, and over the blocks.
#pragma once

#include <type_traits>

#include "kv/decode_eight.cuh"
#include "kv/decode_sixteen.cuh"

namespace qoq::kv {

template <class A>
using TileOfColumns = std::conditional_t<A::kHeadTiles == 1, TileOfEight<A>, TileOfSixteen<A>>;
template <class A>
using Sums = typename TileOfColumns<A>::Sums;

// Which of the vectors of a slice a thread has. Of 96 channels the last threads have what another
// has too, and write the same.
template <class A>
__device__ inline int vector_of(int lane) {
  return A::kSlice == 32 * A::kVector ? lane : min(lane, A::kSlice / A::kVector - 1);
}

// The sums for some channels of one query head. Weights and values are relative to 2^maximum.
template <int kChannels>
struct Partial {
  float maximum = -INFINITY, weights = 0;
  alignas(16) float values[kChannels] = {};

  // `maximum` has to be that of all that is added, which `kMayBeEmpty` says may have seen no token.
  template <bool kMayBeEmpty>
  __device__ void add(float other_maximum, float other_weights, const float* other_values) {
    const float base = kMayBeEmpty && maximum == -INFINITY ? 0 : maximum;
    const float factor = ptx::exp2_approx(other_maximum - base);
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

// Adds up what `count` blocks have for a slice of one head. `parts` is slot 0 of the first block;
// that block's part is in its slot 1, `slot` floats on, and the parts of the others are in their
// slots 0.
//
// The rest of the GPU has nothing left to do while this waits for memory, and a warp that is alone
// takes about 5 cycles for an instruction. So every quarter of the warp takes another part, and the
// first loads are under way before the maximum is known.
template <class A>
__device__ inline Vector<A> add_parts(const float* parts, int slice, int count, int slot) {
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
            i < count ? __ldcg(reinterpret_cast<const Channels<A>*>(part(i) + slice * A::kSlice) +
                               vector_of<A>(8 * j + lane % 8))
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

// What the warps of a block tell each other, in shared memory.
template <class A>
struct Shares {
  // A segment of which several warps, or other blocks, may have parts too.
  struct alignas(A::kHasManyQueries ? 8 : 16) Share {
    Segment<A> segment;
    int first_warp, last_warp;  // of this block; none where first_warp > last_warp
    int first_part;             // where the first warp's part is, in bytes of the shared memory
  };
  // Of the first segment of every warp, and of the block's last segment. A segment is here once.
  Share shares[A::kWarps + 1];
  Segment<A> last;
  BlockRange blocks[A::kWarps];  // the same for all, each its own until they have met
  int is_last[2];  // whether this block is the last to come, at its first and last segment
};

template <class A>
class Merger {
 public:
  static_assert(A::kVector * sizeof(float) == sizeof(Channels<A>));
  static_assert(sizeof(Shares<A>) <= A::kSharesBytes && A::kSharesBytes % 16 == 0);

  // `shared` is the block's shared memory, which begins with the rings of its warps.
  __device__ Merger(const Params& p, const Range<A>& range, char* shared)
      : p_(p), begin_(range.begin), end_(range.end), shared_(shared) {
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 != 0) return;
    shares().blocks[warp] = range.block;
    // The first segment may be that of the warp before, too.
    const bool is_new = warp == 0 || range.first.begin > range.block.begin_of(warp - 1);
    shares().shares[warp] = share_of(range.first, range.begin < range.end && is_new, range.block);
  }

  // Called by a warp when its part of a segment is complete. Parts are left to add_warps: of the
  // warp's segments, only the first can have begun before, and only the last go on.
  __device__ void finish(const Segment<A>& segment, const Query<A>& query, Sums<A>& sums) const {
    using V = typename A::V;
    const int warp = threadIdx.x / 32;
    const bool is_whole = segment.is_in(begin_, end_);
    auto* part = reinterpret_cast<float*>(
        shared_ + (segment.begin <= begin_ ? first_part(warp) : last_part(warp)));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float weights = sums.all_weights(j);
      const int column = sums.column(j);
      if (column >= p_.group) continue;
      const float maximum = sums.maximum[j] * query.to_log2[j];
      float* out = part + column * A::kPartial;
#pragma unroll
      for (int q = 0; q < Sums<A>::kRunLanes; ++q) {
        const int lane = sums.run_lane(q);
        float values[A::kChannels];
#pragma unroll
        for (int i = 0; i < A::kChannels; ++i)
          values[i] = fmaf(sums.value(j, q, i), 1 / (i % 2 == 0 ? V::kLowUnit : V::kHighUnit),
                           -sums.zero(j));
        if (is_whole) {
#pragma unroll
          for (int run = 0; run < V::kRuns; ++run)
            write_output<V::kRunChannels>(segment, column, 8 * run + lane,
                                          values + run * V::kRunChannels, maximum, weights);
          continue;
        }
#pragma unroll
        for (int i = 0; i < A::kChannels; i += 4)
          *reinterpret_cast<float4*>(out + (i / V::kRunChannels * 8 + lane) * V::kRunChannels +
                                     i % V::kRunChannels) = {values[i], values[i + 1],
                                                             values[i + 2], values[i + 3]};
        if (lane == 0) *reinterpret_cast<float2*>(out + A::kHeadSize) = {maximum, weights};
      }
    }
  }

  // Called by all threads once their warps are done; `last` is the warp's last segment. A segment
  // of which other blocks have parts too is left to add_blocks.
  __device__ void add_warps(const Segment<A>& last) const {
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (lane == 0 && begin_ < end_ && end_ == shares().blocks[warp].end) {
      shares().last = last;
      shares().shares[A::kWarps] = share_of(last, last.begin > begin_, shares().blocks[warp]);
    }
    __syncthreads();
    const BlockRange block = shares().blocks[0];
    const bool is_there =
        lane <= A::kWarps && shares().shares[lane].first_warp <= shares().shares[lane].last_warp;
    // Each warp takes every kWarps-th of the slices of heads of all shares.
    const int slices = p_.group * A::kSlices;
    int i = warp;
    for (uint32_t left = __ballot_sync(kAllLanes, is_there); left != 0; left &= left - 1) {
      const Share share = shares().shares[__ffs(left) - 1];
      for (; i < slices; i += A::kWarps) {
        const int head = i / A::kSlices, slice = i % A::kSlices;
        const Vector<A> v = add_parts_of_warps(share, head, slice);
        if (share.segment.is_in(block.begin, block.end)) {
          write_slice(share.segment, head, slice, v);
        } else {
          const int slot = share.segment.begin < block.begin ? 0 : 1;
          write_partial(partial_of(blockIdx.x, slot) + head * A::kPartial, slice, v);
        }
      }
      i -= slices;
    }
  }

  // Called by all threads, once, at the end: only then are registers free for many loads. The last
  // block to come adds up the parts of a segment, in the order of the blocks.
  __device__ void add_blocks() const {
    const int warp = threadIdx.x / 32;
    __syncthreads();  // the partial sums of this block are written
    if (threadIdx.x % 32 == 0 && warp < 2) {
      const Owners owners = owners_of(end_of_block(warp));
      const bool is_same = warp == 0 && end_of_block(0).begin == end_of_block(1).begin;
      bool is_last = false;
      if (owners.first < owners.last && !is_same) {
        int32_t* counter = p_.counters + owners.first;
        is_last = ptx::atomic_add_acq_rel(counter, 1) == owners.last - owners.first;
        if (is_last) *counter = 0;  // for the next launch
      }
      shares().is_last[warp] = is_last;
    }
    __syncthreads();
#pragma unroll 1  // so that the code is there only once
    for (int i = 0; i < 2; ++i) {
      if (!shares().is_last[i]) continue;
      const Segment<A> segment = end_of_block(i);
      const Owners owners = owners_of(segment);
      for (int j = warp; j < p_.group * A::kSlices; j += A::kWarps) {
        const int head = j / A::kSlices, slice = j % A::kSlices;
        const float* parts = partial_of(owners.first, 0) + head * A::kPartial;
        const int count = owners.last - owners.first + 1;
        const Vector<A> v = add_parts<A>(parts, slice, count, p_.group * A::kPartial);
        write_slice(segment, head, slice, v);
      }
    }
  }

 private:
  using Share = typename Shares<A>::Share;

  __device__ Shares<A>& shares() const {
    return *reinterpret_cast<Shares<A>*>(shared_ + A::kRingBytes);
  }

  // The first segment of the block, and the last one.
  __device__ const Segment<A>& end_of_block(int i) const {
    return i == 0 ? shares().shares[0].segment : shares().last;
  }

  // The blocks with a segment's tiles.
  struct Owners {
    int first, last;
  };

  __device__ Owners owners_of(const Segment<A>& segment) const {
    const int length = A::kWarps * shares().blocks[0].share;
    return {segment.begin / length, (segment.end() - 1) / length};
  }

  // A segment as one that warps share if `is_declared` and this warp has not all of it.
  __device__ Share share_of(const Segment<A>& segment, bool is_declared,
                            const BlockRange& block) const {
    if (!is_declared || segment.is_in(begin_, end_)) return {segment, 1, 0, 0};
    const int begin = max(segment.begin, block.begin), end = min(segment.end(), block.end);
    const int first = (begin - block.begin) / block.share;
    return {segment, first, (end - 1 - block.begin) / block.share,
            segment.begin > block.begin_of(first) ? last_part(first) : first_part(first)};
  }

  __device__ float* partial_of(int block, int slot) const {
    return p_.partials + (int64_t{block} * 2 + slot) * p_.group * A::kPartial;
  }

  // Where a warp has its part of its first segment, and of its last one, in bytes of the shared
  // memory.
  __device__ int first_part(int warp) const {
    return A::kRingBytes + A::kSharesBytes + warp * p_.group * (A::kPartial * 4);
  }
  __device__ static int last_part(int warp) { return warp * A::kWarpRingBytes; }

  // All that warps may have is loaded at once, whether they have it or not.
  __device__ Vector<A> add_parts_of_warps(const Share& share, int head, int slice) const {
    const int first = share.first_warp, last = share.last_warp;
    auto has_part = [&](int warp) { return warp >= first && warp <= last; };
    float2 numbers[A::kWarps];
    Channels<A> values[A::kWarps];
    Vector<A> sum;
#pragma unroll
    for (int warp = 0; warp < A::kWarps; ++warp) {
      const int offset = warp == first ? share.first_part : first_part(warp);
      const auto* part = reinterpret_cast<const float*>(shared_ + offset) + head * A::kPartial;
      numbers[warp] = *reinterpret_cast<const float2*>(part + A::kHeadSize);
      values[warp] = reinterpret_cast<const Channels<A>*>(
          part + slice * A::kSlice)[vector_of<A>(threadIdx.x % 32)];
    }
#pragma unroll
    for (int warp = 0; warp < A::kWarps; ++warp)
      if (has_part(warp)) sum.maximum = fmaxf(sum.maximum, numbers[warp].x);
#pragma unroll
    for (int warp = 0; warp < A::kWarps; ++warp)
      if (has_part(warp))
        sum.template add<A::kHasManyQueries>(numbers[warp].x, numbers[warp].y,
                                             reinterpret_cast<const float*>(&values[warp]));
    return sum;
  }

  __device__ void write_partial(float* out, int slice, const Vector<A>& v) const {
    const int lane = threadIdx.x % 32;
    reinterpret_cast<Channels<A>*>(out + slice * A::kSlice)[vector_of<A>(lane)] =
        *reinterpret_cast<const Channels<A>*>(v.values);
    if (lane == 0 && slice == 0)
      *reinterpret_cast<float2*>(out + A::kHeadSize) = {v.maximum, v.weights};
  }

  __device__ void write_slice(const Segment<A>& segment, int head, int slice,
                              const Vector<A>& v) const {
    const int part = slice * (A::kSlice / A::kVector) + vector_of<A>(threadIdx.x % 32);
    write_output<A::kVector>(segment, head, part, v.values, v.maximum, v.weights);
  }

  // Writes the `part`-th kCount channels of a head. A sink adds its weight to those of the tokens,
  // which are 2^kWeightExponent where the score is the maximum.
  template <int kCount>
  __device__ void write_output(const Segment<A>& segment, int head_of_group, int part,
                               const float* values, float maximum, float weights) const {
    const auto [head, token, is_there] = column_of<A>(p_, segment, head_of_group);
    bool is_seeing = true;
    if constexpr (A::kHasManyQueries) {
      if (!is_there) return;
      is_seeing = segment.length - segment.count + token >= 0;
    }
    if (p_.sinks != nullptr) {
      const float sink = to_float2(static_cast<const uint16_t*>(p_.sinks)[head], p_.is_bfloat16).x;
      weights += ptx::exp2_approx(fmaf(sink, kLog2E, A::kWeightExponent - maximum));
    }
    auto* out = static_cast<uint16_t*>(p_.out) + row_of<A>(segment, token) * p_.out_stride +
                head * p_.out_head_stride + part * kCount;
    const float factor = 1 / weights;
    uint32_t pairs[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i)
      pairs[i] = is_seeing
                     ? to_pair(values[2 * i] * factor, values[2 * i + 1] * factor, p_.is_bfloat16)
                     : 0;
    if constexpr (kCount == 2) {
      *reinterpret_cast<uint32_t*>(out) = pairs[0];
    } else {
#pragma unroll
      for (int i = 0; i < kCount / 2; i += 2)
        *reinterpret_cast<uint2*>(out + 2 * i) = {pairs[i], pairs[i + 1]};
    }
  }

  const Params& p_;
  const int begin_, end_;
  char* shared_;
};

}  // namespace qoq::kv
