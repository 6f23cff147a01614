// int8 codes, scale and row sum of every token: `reference.quantize_per_token`, bit for bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "common/checks.h"
#include "common/ptx.cuh"
#include "ops.h"

namespace qoq {
namespace {

constexpr const char* kOp = "quantize_per_token";
constexpr int kManyTokens = 512;  // that fill the GPU with small blocks
constexpr float kInt8Max = 127.f;
constexpr float kMinScale = 1e-10f;

__device__ float to_float(float v) { return v; }
__device__ float to_float(__half v) { return __half2float(v); }
__device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) Vector {
  T values[kVector];
};

template <int kVector>
struct alignas(kVector) Codes {
  int8_t values[kVector];
};

// round(x / scale), to the bit of the division, which is left to the few cases near a tie: a
// product with the inverse is off by less than 127 * 2^-22.
__device__ inline float quotient(float x, float scale, float inverse) {
  const float product = x * inverse, rounded = rintf(product);
  if (fabsf(product - rounded) < 0.4999f) return rounded;
  return rintf(__fdiv_rn(x, scale));
}

// A block of up to kThreads a token. A thread holds kHeld vectors of kVector values in registers;
// what a longer row has beyond them is read twice.
template <typename T, int kVector, int kHeld, int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    quantize_kernel(const T* x, int64_t row_stride, int k, int8_t* codes, float* scales,
                    int32_t* row_sums) {
  using Values = Vector<T, kVector>;
  __shared__ uint32_t largest[kThreads / 32];
  __shared__ int32_t sums[kThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warps = blockDim.x / 32, vectors = k / kVector;
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  const auto* row = reinterpret_cast<const Values*>(x + blockIdx.x * row_stride);
  auto* row_codes = reinterpret_cast<Codes<kVector>*>(codes + int64_t{blockIdx.x} * k);

  // 1. The largest magnitude. As integers, so that NaN is the largest of all and not lost.
  uint32_t bits = 0;
  auto look_at = [&](const Values& v) {
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      bits = max(bits, __float_as_uint(to_float(v.values[j])) & 0x7FFFFFFF);
  };
  Values held[kHeld];
#pragma unroll
  for (int h = 0; h < kHeld; ++h)
    if (const int i = h * blockDim.x + threadIdx.x; i < vectors) held[h] = row[i];
#pragma unroll
  for (int h = 0; h < kHeld; ++h)
    if (h * blockDim.x + threadIdx.x < vectors) look_at(held[h]);
  const int rest = kHeld * blockDim.x + threadIdx.x;
  for (int i = rest; i < vectors; i += blockDim.x) look_at(row[i]);
  bits = __reduce_max_sync(0xFFFFFFFF, bits);
  if (lane == 0) largest[warp] = bits;
  __syncthreads();
  bits = __reduce_max_sync(0xFFFFFFFF, lane < warps ? largest[lane] : 0);
  const float exact = __fdiv_rn(__uint_as_float(bits), kInt8Max);
  const float scale = exact < kMinScale ? kMinScale : exact;
  const float inverse = __frcp_rn(scale);

  // 2. Codes.
  int32_t sum = 0;
  auto write = [&](const Values& v, int i) {
    Codes<kVector> out;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float rounded = quotient(to_float(v.values[j]), scale, inverse);
      out.values[j] = static_cast<int8_t>(fminf(fmaxf(rounded, -kInt8Max), kInt8Max));
      sum += out.values[j];
    }
    row_codes[i] = out;
  };
#pragma unroll
  for (int h = 0; h < kHeld; ++h)
    if (const int i = h * blockDim.x + threadIdx.x; i < vectors) write(held[h], i);
  for (int i = rest; i < vectors; i += blockDim.x) write(row[i], i);
  sum = __reduce_add_sync(0xFFFFFFFF, sum);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (warp > 0) return;
  sum = __reduce_add_sync(0xFFFFFFFF, lane < warps ? sums[lane] : 0);
  if (lane == 0) {
    scales[blockIdx.x] = scale;
    row_sums[blockIdx.x] = sum;
  }
}

template <typename T, int kVector, int kHeld, int kThreads>
void launch(const Tensor& x, Tensor& codes, Tensor& scale, Tensor& row_sum, cudaStream_t stream) {
  const int k = static_cast<int>(x.size(1));
  const int vectors = k / kVector;
  // Few tokens: a vector a thread, where a block has so many threads.
  const int per_thread = kThreads == 1024 && vectors <= kThreads ? 1 : kHeld;
  const int warps = (vectors / per_thread + 31) / 32;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(x.size(0));
  config.blockDim = dim3(std::clamp(warps, 1, kThreads / 32) * 32);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  CHECK_CUDA(cudaLaunchKernelEx(
      &config, quantize_kernel<T, kVector, kHeld, kThreads>, static_cast<const T*>(x.data_ptr()),
      x.stride(0), k, static_cast<int8_t*>(codes.data_ptr()), static_cast<float*>(scale.data_ptr()),
      static_cast<int32_t*>(row_sum.data_ptr())));
}

// 16 bytes at a time where every row begins at a multiple of 16.
template <typename T>
void dispatch(const Tensor& x, Tensor& codes, Tensor& scale, Tensor& row_sum, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const bool is_aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 &&
                          x.stride(0) % kVector == 0 && x.size(1) % kVector == 0;
  if (!is_aligned) return launch<T, 1, 4, 256>(x, codes, scale, row_sum, stream);
  if (x.size(0) >= kManyTokens) return launch<T, kVector, 4, 512>(x, codes, scale, row_sum, stream);
  launch<T, kVector, 2, 1024>(x, codes, scale, row_sum, stream);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> quantize_per_token(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, kOp, ": x is ", shape_text(x), ", expected floats [M, K]");
  const int64_t m = x.size(0), k = x.size(1);
  STD_TORCH_CHECK(k > 0 && k <= 1 << 24 && m < int64_t{1} << 31, kOp, ": x is ", shape_text(x),
                  ", expected 1 to 2^24 columns");
  STD_TORCH_CHECK(x.stride(1) == 1 || m == 0, kOp, ": the columns of x are not contiguous");
  const std::vector<int64_t> matrix = {m, k}, column = {m};
  Tensor codes = torch::stable::new_empty(x, matrix, ScalarType::Char);
  Tensor scale = torch::stable::new_empty(x, column, ScalarType::Float);
  Tensor row_sum = torch::stable::new_empty(x, column, ScalarType::Int);
  if (m == 0) return {codes, scale, row_sum};
  const int device = device_of(x);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      dispatch<__nv_bfloat16>(x, codes, scale, row_sum, stream);
      break;
    case ScalarType::Half:
      dispatch<__half>(x, codes, scale, row_sum, stream);
      break;
    case ScalarType::Float:
      dispatch<float>(x, codes, scale, row_sum, stream);
      break;
    default:
      STD_TORCH_CHECK(false, kOp, ": x is ", torch::headeronly::toString(x.scalar_type()),
                      ", expected BFloat16, Half or Float");
  }
  return {codes, scale, row_sum};
}

}  // namespace qoq
