// The Hadamard rotation of a head, whose channels are spread over neighbouring lanes.
#pragma once

#include <cuda_runtime.h>

namespace qoq::kv {

// Multiplies by Sylvester's matrix, without the 1 / sqrt(size) that makes it its own inverse. Lane
// l of kLanes holds channels kCount * l + i. The sums are those of `reference_attention.hadamard`;
// any other order of the index bits would add in another order. Whole warps take part.
template <int kLanes, int kCount>
__device__ inline void rotate(float (&v)[kCount]) {
#pragma unroll
  for (int step = 1; step < kCount; step *= 2)
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i & step) continue;
      const float sum = v[i] + v[i + step], difference = v[i] - v[i + step];
      v[i] = sum;
      v[i + step] = difference;
    }
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2)
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float other = __shfl_xor_sync(0xFFFFFFFF, v[i], step);
      v[i] = (threadIdx.x & step) != 0 ? other - v[i] : v[i] + other;
    }
}

// The same with the 1 / sqrt(size), rounded once.
template <int kLanes, int kCount>
__device__ inline void rotate_normalized(float (&v)[kCount]) {
  constexpr int kSize = kLanes * kCount;
  static_assert(kSize == 64 || kSize == 128 || kSize == 256);
  constexpr float kRoot = kSize == 64 ? 8.f : kSize == 128 ? 11.313708498984761f : 16.f;
  rotate<kLanes>(v);
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = __fdiv_rn(v[i], kRoot);
}

}  // namespace qoq::kv
