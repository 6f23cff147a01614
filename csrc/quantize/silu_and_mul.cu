// silu(gate) * up and quantization of every token in one kernel, in float32 throughout.
#include "ops.h"
#include "quantize/rows.cuh"

namespace qoq {
namespace {

constexpr const char *kOp = "silu_and_mul_quantize", *kExpertsOp = "silu_and_mul_quantize_experts";

template <typename T, int kVector>
struct SiluAndMul {
  using Constants = NoConstants;
  static constexpr bool kNormalises = false;

  const T* gate_up;
  int64_t stride;
  int k;

  __device__ NoConstants constants(int) const { return {}; }

  template <bool kIsFirst>
  __device__ void load(int64_t row, int i, float* values) const {
    const T* begin = gate_up + row * stride;
    const auto gate = reinterpret_cast<const Vector<T, kVector>*>(begin)[i];
    const auto up = reinterpret_cast<const Vector<T, kVector>*>(begin + k)[i];
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float g = to_float(gate.values[j]);
      values[j] = __fdividef(g, 1.f + __expf(-g)) * to_float(up.values[j]);
    }
  }
};

template <typename T, typename Target>
void dispatch(const Tensor& x, const Target& out, cudaStream_t stream) {
  const auto* data = static_cast<const T*>(x.data_ptr());
  const int64_t stride = x.stride(0);
  const int k = static_cast<int>(x.size(1) / 2);
  quantize_rows<T>([=]<int kVector>() { return SiluAndMul<T, kVector>{data, stride, k}; },
                   is_aligned<T>(x) && k % (16 / sizeof(T)) == 0, x.size(0), k, out, stream);
}

void check(const char* op, const Tensor& x) {
  check_rows(op, x);
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, op, ": x is ",
                  torch::headeronly::toString(type), ", expected BFloat16 or Half");
  STD_TORCH_CHECK(x.size(1) % 2 == 0, op, ": x is ", shape_text(x),
                  ", expected gate and up side by side, [M, 2 K]");
}

template <typename Target>
void quantize(const Tensor& x, const Target& out) {
  const int device = device_of(x);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto run = x.scalar_type() == ScalarType::Half ? dispatch<__half, Target>
                                                       : dispatch<__nv_bfloat16, Target>;
  run(x, out, current_stream(device));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> silu_and_mul_quantize(const Tensor& x) {
  check(kOp, x);
  QuantizedTensors out(x, x.size(0), x.size(1) / 2);
  if (x.size(0) > 0) quantize(x, out.rows());
  return {out.codes, out.scale, out.row_sum};
}

std::tuple<Tensor, Tensor, Tensor> silu_and_mul_quantize_experts(const Tensor& x,
                                                                 const Tensor& tiles,
                                                                 int64_t tile) {
  check(kExpertsOp, x);
  check_tensor(kExpertsOp, "tiles", tiles, device_of(x), ScalarType::Int, {1}, 4);
  QuantizedTensors out(x, x.size(0), x.size(1) / 2);
  if (x.size(0) > 0)
    quantize(x, RowsOfTiles{out.rows(), static_cast<const int32_t*>(tiles.data_ptr()),
                            static_cast<int>(tile)});
  return {out.codes, out.scale, out.row_sum};
}

}  // namespace qoq
