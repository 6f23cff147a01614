// Turns rows of floats into int8 codes, scale and row sum, whatever the floats come from.
//
// A Source makes a row's values in float32, kVector of them at a time. It has
//   Constants    what does not depend on the kernels before this one and is read before waiting
//   kNormalises  whether values are multiplied by 1 / sqrt(mean square + epsilon) and the constants
//   constants(i), load<kIsFirst>(row, i, values), normalise(constants, factor, values)
// kIsFirst is true the one time that a vector is loaded first; vectors of long rows are read again.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/vector.cuh"

namespace qoq {

constexpr int kManyTokens = 512;  // tokens that fill the GPU with small blocks
constexpr float kInt8Max = 127.f;
constexpr float kMinScale = 1e-10f;

// Where results go: each row to one of its own.
struct QuantizedRows {
  int8_t* codes;
  float* scales;
  int32_t* sums;

  // Whether the next kernel may begin only when the one before this has ended.
  static constexpr bool kTriggersLate = false;
  __device__ bool skips(int64_t) const { return false; }
  __device__ int copies() const { return 1; }
  __device__ int64_t at(int64_t row, int) const { return row; }
};

// Each token to the rows of its experts; -1 stands for an expert that is not here. Where the tiles
// of the experts lie was written by the kernel before: whoever comes next may read that at once.
struct RowsOfExperts : QuantizedRows {
  const int32_t* rows;  // [tokens, experts_of_token]
  int experts_of_token;

  static constexpr bool kTriggersLate = true;
  __device__ int copies() const { return experts_of_token; }
  __device__ int64_t at(int64_t row, int copy) const { return rows[row * experts_of_token + copy]; }
};

// Each row to one of its own, as far as there are tiles.
struct RowsOfTiles : QuantizedRows {
  const int32_t* tiles;  // [1]
  int tile;

  __device__ bool skips(int64_t row) const { return row >= int64_t{*tiles} * tile; }
};

struct NoConstants {};

// round(x / scale), bit for bit as with a division, which is left to the few cases near a tie: a
// product with the inverse is off by less than 127 * 2^-22.
__device__ inline float quotient(float x, float scale, float inverse) {
  const float product = x * inverse, rounded = rintf(product);
  if (fabsf(product - rounded) < 0.4999f) return rounded;
  return rintf(__fdiv_rn(x, scale));
}

// One block of up to kThreads threads does a row. A thread holds kHeld vectors of kVector values in
// registers; what a longer row has beyond them is made twice, and three times where it is
// normalised.
template <typename Source, typename Target, int kVector, int kHeld, int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    quantize_rows_kernel(const Source source, int k, const Target out) {
  __shared__ float squares[kThreads / 32];
  __shared__ uint32_t largest[kThreads / 32];
  __shared__ int32_t sums[kThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warps = blockDim.x / 32, vectors = k / kVector;
  const int rest = kHeld * blockDim.x + threadIdx.x;
  const int64_t row = blockIdx.x;
  using Constants = typename Source::Constants;

  if constexpr (!Target::kTriggersLate) ptx::griddepcontrol_launch_dependents();
  Constants constants[kHeld];
#pragma unroll
  for (int h = 0; h < kHeld; ++h)
    if (const int i = h * blockDim.x + threadIdx.x; i < vectors) constants[h] = source.constants(i);
  ptx::griddepcontrol_wait();
  if constexpr (Target::kTriggersLate) ptx::griddepcontrol_launch_dependents();
  if (out.skips(row)) return;

  float held[kHeld][kVector];
#pragma unroll
  for (int h = 0; h < kHeld; ++h)
    if (const int i = h * blockDim.x + threadIdx.x; i < vectors)
      source.template load<true>(row, i, held[h]);

  // 1. The norm, if the source has one.
  float factor = 1.f;
  if constexpr (Source::kNormalises) {
    float square = 0.f, v[kVector];
    auto add = [&](const float* values) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) square = fmaf(values[j], values[j], square);
    };
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
      if (h * blockDim.x + threadIdx.x < vectors) add(held[h]);
    for (int i = rest; i < vectors; i += blockDim.x) {
      source.template load<true>(row, i, v);
      add(v);
    }
    for (int step = 16; step > 0; step /= 2) square += __shfl_xor_sync(0xFFFFFFFF, square, step);
    if (lane == 0) squares[warp] = square;
    __syncthreads();
    square = lane < warps ? squares[lane] : 0.f;
    for (int step = 16; step > 0; step /= 2) square += __shfl_xor_sync(0xFFFFFFFF, square, step);
    factor = rsqrtf(square / k + source.epsilon);
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
      if (h * blockDim.x + threadIdx.x < vectors) source.normalise(constants[h], factor, held[h]);
  }
  auto make = [&](int i, float* values) {
    source.template load<!Source::kNormalises>(row, i, values);
    if constexpr (Source::kNormalises) source.normalise(source.constants(i), factor, values);
  };

  // 2. The largest magnitude, compared as integers, so that NaN is the largest of all and not lost.
  uint32_t bits = 0;
  auto look_at = [&](const float* values) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) bits = max(bits, __float_as_uint(values[j]) & 0x7FFFFFFF);
  };
#pragma unroll
  for (int h = 0; h < kHeld; ++h)
    if (h * blockDim.x + threadIdx.x < vectors) look_at(held[h]);
  for (int i = rest; i < vectors; i += blockDim.x) {
    float v[kVector];
    make(i, v);
    look_at(v);
  }
  bits = __reduce_max_sync(0xFFFFFFFF, bits);
  if (lane == 0) largest[warp] = bits;
  __syncthreads();
  bits = __reduce_max_sync(0xFFFFFFFF, lane < warps ? largest[lane] : 0);
  const float exact = __fdiv_rn(__uint_as_float(bits), kInt8Max);
  const float scale = exact < kMinScale ? kMinScale : exact;
  const float inverse = __frcp_rn(scale);

  // 3. Codes.
  int32_t sum = 0;
  using Codes = Vector<int8_t, kVector>;
  auto write = [&](const float* values, int i) {
    Codes rounded;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float code = quotient(values[j], scale, inverse);
      rounded.values[j] = static_cast<int8_t>(fminf(fmaxf(code, -kInt8Max), kInt8Max));
      sum += rounded.values[j];
    }
#pragma unroll 1
    for (int copy = 0; copy < out.copies(); ++copy)
      if (const int64_t to = out.at(row, copy); to >= 0)
        reinterpret_cast<Codes*>(out.codes + to * k)[i] = rounded;
  };
#pragma unroll
  for (int h = 0; h < kHeld; ++h)
    if (const int i = h * blockDim.x + threadIdx.x; i < vectors) write(held[h], i);
  for (int i = rest; i < vectors; i += blockDim.x) {
    float v[kVector];
    make(i, v);
    write(v, i);
  }
  sum = __reduce_add_sync(0xFFFFFFFF, sum);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (warp > 0) return;
  sum = __reduce_add_sync(0xFFFFFFFF, lane < warps ? sums[lane] : 0);
  for (int copy = lane; copy < out.copies(); copy += 32) {
    if (const int64_t to = out.at(row, copy); to >= 0) {
      out.scales[to] = scale;
      out.sums[to] = sum;
    }
  }
}

template <int kVector, int kHeld, int kThreads, typename Source, typename Target>
void launch_quantize_rows(const Source& source, int64_t m, int k, const Target& out,
                          cudaStream_t stream) {
  const int vectors = k / kVector;
  // For few tokens each thread has one vector, where a block has so many threads.
  const int per_thread = kThreads == 1024 && vectors <= kThreads ? 1 : kHeld;
  const int warps = (vectors / per_thread + 31) / 32;
  launch_early<quantize_rows_kernel<Source, Target, kVector, kHeld, kThreads>>(
      static_cast<int>(m), std::clamp(warps, 1, kThreads / 32) * 32, 0, stream, source, k, out);
}

// make_source<kVector>() is the source. It is read 16 bytes of T at a time where `is_aligned`.
template <typename T, typename MakeSource, typename Target>
void quantize_rows(const MakeSource& make_source, bool is_aligned, int64_t m, int k,
                   const Target& out, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  if (!is_aligned)
    launch_quantize_rows<1, 4, 256>(make_source.template operator()<1>(), m, k, out, stream);
  else if (m >= kManyTokens)
    launch_quantize_rows<kVector, 4, 512>(make_source.template operator()<kVector>(), m, k, out,
                                          stream);
  else
    launch_quantize_rows<kVector, 2, 1024>(make_source.template operator()<kVector>(), m, k, out,
                                           stream);
}

template <typename T>
bool is_aligned(const Tensor& x) {
  constexpr int kVector = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && x.stride(0) % kVector == 0;
}

// The output tensors for m rows of k columns on the device of x, and pointers to them.
struct QuantizedTensors {
  Tensor codes, scale, row_sum;

  QuantizedTensors(const Tensor& x, int64_t m, int64_t k)
      : codes(torch::stable::new_empty(x, std::vector{m, k}, ScalarType::Char)),
        scale(torch::stable::new_empty(x, std::vector{m}, ScalarType::Float)),
        row_sum(torch::stable::new_empty(x, std::vector{m}, ScalarType::Int)) {}

  QuantizedRows rows() {
    return {static_cast<int8_t*>(codes.data_ptr()), static_cast<float*>(scale.data_ptr()),
            static_cast<int32_t*>(row_sum.data_ptr())};
  }
};

inline void check_rows(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, op, ": x is ", shape_text(x), ", expected floats [M, K]");
  const int64_t m = x.size(0), k = x.size(1);
  STD_TORCH_CHECK(k > 0 && k <= 1 << 24 && m < int64_t{1} << 31, op, ": x is ", shape_text(x),
                  ", expected 1 to 2^24 columns");
  STD_TORCH_CHECK(x.stride(1) == 1 || m == 0, op, ": the columns of x are not contiguous");
}

}  // namespace qoq
