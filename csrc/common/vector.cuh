// Floats of 16 and 32 bits, and a few of them that are read or written at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace qoq {

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ T from_float(float v);
template <>
__device__ inline __half from_float(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_float(float v) {
  return __float2bfloat16_rn(v);
}

template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) Vector {
  T values[kVector];
};

}  // namespace qoq
