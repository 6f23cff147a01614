// Adds up what the experts of each token made of it, with the router's weights.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "common/checks.h"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/vector.cuh"
#include "ops.h"

namespace qoq {
namespace {

constexpr const char* kOp = "combine_experts";
constexpr int kVector = 8;  // halves in 16 bytes
constexpr int kMostThreads = 256;
constexpr int kAtOnce = 8;  // experts whose rows are read at the same time

// One block does a token. The sum is float32, in the order of the token's experts and without fused
// multiply-adds, as in `reference_experts.combine`.
template <typename T>
__global__ void __launch_bounds__(kMostThreads)
    combine_kernel(const T* y, const int32_t* rows, const float* weights, int experts, int hidden,
                   T* out) {
  using Halves = Vector<T, kVector>;
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  const int64_t token = blockIdx.x;
  const int vectors = hidden / kVector;
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    float sum[kVector] = {};
    for (int first = 0; first < experts; first += kAtOnce) {
      int row[kAtOnce];
      float weight[kAtOnce];
      Halves of_expert[kAtOnce];
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        const int64_t pair = token * experts + first + e;
        const bool is_there = first + e < experts;
        row[e] = is_there ? rows[pair] : -1;
        weight[e] = is_there ? weights[pair] : 0;
      }
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e)
        if (row[e] >= 0)
          of_expert[e] = reinterpret_cast<const Halves*>(y + int64_t{row[e]} * hidden)[i];
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        if (row[e] < 0) continue;
#pragma unroll
        for (int j = 0; j < kVector; ++j)
          sum[j] = __fadd_rn(sum[j], __fmul_rn(weight[e], to_float(of_expert[e].values[j])));
      }
    }
    Halves rounded;
#pragma unroll
    for (int j = 0; j < kVector; ++j) rounded.values[j] = from_float<T>(sum[j]);
    reinterpret_cast<Halves*>(out + token * hidden)[i] = rounded;
  }
}

template <typename T>
void run(const Tensor& y, const Tensor& rows, const Tensor& weights, Tensor& out,
         cudaStream_t stream) {
  const int hidden = static_cast<int>(y.size(1));
  const int threads = std::clamp((hidden / kVector + 31) / 32 * 32, 32, kMostThreads);
  launch_early<combine_kernel<T>>(
      static_cast<int>(rows.size(0)), threads, 0, stream, static_cast<const T*>(y.data_ptr()),
      static_cast<const int32_t*>(rows.data_ptr()), static_cast<const float*>(weights.data_ptr()),
      static_cast<int>(rows.size(1)), hidden, static_cast<T*>(out.data_ptr()));
}

}  // namespace

Tensor combine_experts(const Tensor& y, const Tensor& rows, const Tensor& topk_weights) {
  STD_TORCH_CHECK(y.dim() == 2 && rows.dim() == 2, kOp, ": y is ", shape_text(y), " and rows ",
                  shape_text(rows), ", expected [rows, hidden] and [tokens, experts of a token]");
  const ScalarType type = y.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, kOp, ": y is ",
                  torch::headeronly::toString(type), ", expected BFloat16 or Half");
  const int64_t tokens = rows.size(0), each = rows.size(1), hidden = y.size(1);
  STD_TORCH_CHECK(hidden % kVector == 0 && tokens < int64_t{1} << 31, kOp, ": y is ", shape_text(y),
                  ", expected a multiple of 8 columns");
  const int device = device_of(y);
  check_tensor(kOp, "y", y, device, type, {y.size(0), hidden});
  check_tensor(kOp, "rows", rows, device, ScalarType::Int, {tokens, each}, 4);
  check_tensor(kOp, "topk_weights", topk_weights, device, ScalarType::Float, {tokens, each}, 4);
  Tensor out = torch::stable::new_empty(y, std::vector<int64_t>{tokens, hidden}, type);
  if (tokens == 0) return out;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto compute = type == ScalarType::Half ? run<__half> : run<__nv_bfloat16>;
  compute(y, rows, topk_weights, out, current_stream(device));
  return out;
}

}  // namespace qoq
