// int8 codes, scale and row sum of every token, as `reference.quantize_per_token`, bit for bit.
#include "ops.h"
#include "quantize/rows.cuh"

namespace qoq {
namespace {

constexpr const char* kOp = "quantize_per_token";

template <typename T, int kVector>
struct Floats {
  using Constants = NoConstants;
  static constexpr bool kNormalises = false;

  const T* x;
  int64_t stride;

  __device__ NoConstants constants(int) const { return {}; }

  template <bool kIsFirst>
  __device__ void load(int64_t row, int i, float* values) const {
    const auto v = reinterpret_cast<const Vector<T, kVector>*>(x + row * stride)[i];
#pragma unroll
    for (int j = 0; j < kVector; ++j) values[j] = to_float(v.values[j]);
  }
};

template <typename T>
void dispatch(const Tensor& x, const QuantizedRows& out, cudaStream_t stream) {
  const auto* data = static_cast<const T*>(x.data_ptr());
  const int64_t stride = x.stride(0), k = x.size(1);
  quantize_rows<T>([=]<int kVector>() { return Floats<T, kVector>{data, stride}; },
                   is_aligned<T>(x) && k % (16 / sizeof(T)) == 0, x.size(0), static_cast<int>(k),
                   out, stream);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> quantize_per_token(const Tensor& x) {
  check_rows(kOp, x);
  QuantizedTensors out(x, x.size(0), x.size(1));
  if (x.size(0) > 0) {
    const int device = device_of(x);
    const torch::stable::accelerator::DeviceGuard guard(device);
    const cudaStream_t stream = current_stream(device);
    switch (x.scalar_type()) {
      case ScalarType::BFloat16:
        dispatch<__nv_bfloat16>(x, out.rows(), stream);
        break;
      case ScalarType::Half:
        dispatch<__half>(x, out.rows(), stream);
        break;
      case ScalarType::Float:
        dispatch<float>(x, out.rows(), stream);
        break;
      default:
        STD_TORCH_CHECK(false, kOp, ": x is ", torch::headeronly::toString(x.scalar_type()),
                        ", expected BFloat16, Half or Float");
    }
  }
  return {out.codes, out.scale, out.row_sum};
}

}  // namespace qoq
