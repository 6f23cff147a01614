// Residual addition, RMSNorm and quantization of every token in one kernel.
#include "ops.h"
#include "quantize/rows.cuh"

namespace qoq {
namespace {

constexpr const char* kOp = "add_rms_norm_quantize";

template <typename T, int kVector>
struct AddRmsNorm {
  using Constants = Vector<T, kVector>;
  static constexpr bool kNormalises = true;

  const T* x;
  const T* residual;
  const T* weight;
  T* sum;
  int64_t x_stride;
  int k;
  float epsilon;

  __device__ Constants constants(int i) const {
    return reinterpret_cast<const Constants*>(weight)[i];
  }

  template <bool kIsFirst>
  __device__ void load(int64_t row, int i, float* values) const {
    const auto a = reinterpret_cast<const Vector<T, kVector>*>(x + row * x_stride)[i];
    const auto b = reinterpret_cast<const Vector<T, kVector>*>(residual + row * k)[i];
    Vector<T, kVector> rounded;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      values[j] = to_float(a.values[j]) + to_float(b.values[j]);
      rounded.values[j] = from_float<T>(values[j]);
    }
    if constexpr (kIsFirst) reinterpret_cast<Vector<T, kVector>*>(sum + row * k)[i] = rounded;
  }

  // Rounds where vLLM's RMSNorm does, before the product with the weight and after it.
  __device__ void normalise(const Constants& constants, float factor, float* values) const {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float unit = to_float(from_float<T>(values[j] * factor));
      values[j] = to_float(from_float<T>(unit * to_float(constants.values[j])));
    }
  }
};

template <typename T>
void dispatch(const Tensor& x, const Tensor& residual, const Tensor& weight, Tensor& sum,
              float epsilon, const QuantizedRows& out, cudaStream_t stream) {
  const auto* x_data = static_cast<const T*>(x.data_ptr());
  const auto* residual_data = static_cast<const T*>(residual.data_ptr());
  const auto* weight_data = static_cast<const T*>(weight.data_ptr());
  auto* sum_data = static_cast<T*>(sum.data_ptr());
  const int64_t stride = x.stride(0);
  const int k = static_cast<int>(x.size(1));
  quantize_rows<T>(
      [=]<int kVector>() {
        return AddRmsNorm<T, kVector>{x_data, residual_data, weight_data, sum_data, stride,
                                      k,      epsilon};
      },
      is_aligned<T>(x) && k % (16 / sizeof(T)) == 0, x.size(0), k, out, stream);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> add_rms_norm_quantize(const Tensor& x,
                                                                 const Tensor& residual,
                                                                 const Tensor& weight,
                                                                 double epsilon) {
  check_rows(kOp, x);
  const int64_t m = x.size(0), k = x.size(1);
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, kOp, ": x is ",
                  torch::headeronly::toString(type), ", expected BFloat16 or Half");
  const int device = device_of(x);
  check_tensor(kOp, "residual", residual, device, type, {m, k});
  check_tensor(kOp, "weight", weight, device, type, {k});
  QuantizedTensors out(x, m, k);
  Tensor sum = torch::stable::new_empty(residual, std::vector{m, k}, type);
  if (m > 0) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    const cudaStream_t stream = current_stream(device);
    const auto run = type == ScalarType::Half ? dispatch<__half> : dispatch<__nv_bfloat16>;
    run(x, residual, weight, sum, static_cast<float>(epsilon), out.rows(), stream);
  }
  return {out.codes, out.scale, out.row_sum, sum};
}

}  // namespace qoq
