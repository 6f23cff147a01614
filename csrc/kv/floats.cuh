// Pairs of 16-bit floats in a register, whose type is known at run time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/mma.cuh"

namespace qoq::kv {

__device__ inline float2 to_float2(uint32_t pair, bool is_bfloat16) {
  if (is_bfloat16) return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000)};
  __half2_raw raw;
  raw.x = static_cast<uint16_t>(pair);
  raw.y = static_cast<uint16_t>(pair >> 16);
  return __half22float2(raw);
}

__device__ inline uint32_t to_pair(float first, float second, bool is_bfloat16) {
  return is_bfloat16 ? ptx::convert_to_bfloat162(first, second)
                     : ptx::convert_to_half2(first, second);
}

// The scale and the zero of a token, which are stored beside its codes.
__device__ inline float scale_of(uint32_t parameters) { return to_float2(parameters, false).x; }
__device__ inline float zero_of(uint32_t parameters) { return to_float2(parameters, false).y; }

}  // namespace qoq::kv
