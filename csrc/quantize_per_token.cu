// int8 codes, scale and row sum of every token: `reference.quantize_per_token`, bit for bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "common/checks.h"
#include "common/ptx.cuh"
#include "ops.h"

namespace qoq {
namespace {

constexpr const char* kOp = "quantize_per_token";
constexpr int kThreads = 256;
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

// A block a token, kVector values a thread at a time. The second pass finds the row in the L1.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const T* x, int64_t row_stride, int k, int8_t* codes, float* scales,
                    int32_t* row_sums) {
  __shared__ uint32_t largest[kThreads / 32];
  __shared__ int32_t sums[kThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  const T* row = x + blockIdx.x * row_stride;
  const int vectors = k / kVector;

  // 1. The largest magnitude. As integers, so that NaN is the largest of all and not lost.
  uint32_t bits = 0;
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    const auto v = reinterpret_cast<const Vector<T, kVector>*>(row)[i];
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      bits = max(bits, __float_as_uint(to_float(v.values[j])) & 0x7FFFFFFF);
  }
  bits = __reduce_max_sync(0xFFFFFFFF, bits);
  if (lane == 0) largest[warp] = bits;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) bits = max(bits, largest[i]);
  const float quotient = __fdiv_rn(__uint_as_float(bits), kInt8Max);
  const float scale = quotient < kMinScale ? kMinScale : quotient;

  // 2. Codes. A division, as in the reference: a product with 1 / scale rounds differently.
  int32_t sum = 0;
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    const auto v = reinterpret_cast<const Vector<T, kVector>*>(row)[i];
    Codes<kVector> out;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float scaled = rintf(__fdiv_rn(to_float(v.values[j]), scale));
      out.values[j] = static_cast<int8_t>(fminf(fmaxf(scaled, -kInt8Max), kInt8Max));
      sum += out.values[j];
    }
    reinterpret_cast<Codes<kVector>*>(codes + int64_t{blockIdx.x} * k)[i] = out;
  }
  sum = __reduce_add_sync(0xFFFFFFFF, sum);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kThreads / 32; ++i) sum += sums[i];
    scales[blockIdx.x] = scale;
    row_sums[blockIdx.x] = sum;
  }
}

template <typename T, int kVector>
void launch(const Tensor& x, Tensor& codes, Tensor& scale, Tensor& row_sum, cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(x.size(0));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  CHECK_CUDA(cudaLaunchKernelEx(
      &config, quantize_kernel<T, kVector>, static_cast<const T*>(x.data_ptr()), x.stride(0),
      static_cast<int>(x.size(1)), static_cast<int8_t*>(codes.data_ptr()),
      static_cast<float*>(scale.data_ptr()), static_cast<int32_t*>(row_sum.data_ptr())));
}

// 16 bytes at a time where every row begins at a multiple of 16.
template <typename T>
void dispatch(const Tensor& x, Tensor& codes, Tensor& scale, Tensor& row_sum, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const bool is_aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 &&
                          x.stride(0) % kVector == 0 && x.size(1) % kVector == 0;
  if (is_aligned) return launch<T, kVector>(x, codes, scale, row_sum, stream);
  launch<T, 1>(x, codes, scale, row_sum, stream);
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
