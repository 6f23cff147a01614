// int8 codes, scale and row sum of every token, as `reference.quantize_per_token`, bit for bit.
#include "gemm/w4a8_config.h"
#include "ops.h"
#include "quantize/rows.cuh"

namespace qoq {
namespace {

constexpr const char *kOp = "quantize_per_token", *kExpertsOp = "quantize_for_experts";

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

template <typename T, typename Target>
void dispatch(const Tensor& x, const Target& out, cudaStream_t stream) {
  const auto* data = static_cast<const T*>(x.data_ptr());
  const int64_t stride = x.stride(0), k = x.size(1);
  quantize_rows<T>([=]<int kVector>() { return Floats<T, kVector>{data, stride}; },
                   is_aligned<T>(x) && k % (16 / sizeof(T)) == 0, x.size(0), static_cast<int>(k),
                   out, stream);
}
template <typename Target>
void quantize(const char* op, const Tensor& x, const Target& out) {
  const int device = device_of(x);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const ScalarType type = x.scalar_type();
  if (type == ScalarType::BFloat16) return dispatch<__nv_bfloat16>(x, out, stream);
  if (type == ScalarType::Half) return dispatch<__half>(x, out, stream);
  if constexpr (std::is_same_v<Target, QuantizedRows>)
    if (type == ScalarType::Float) return dispatch<float>(x, out, stream);
  constexpr const char* kExpected =
      std::is_same_v<Target, QuantizedRows> ? "BFloat16, Half or Float" : "BFloat16 or Half";
  STD_TORCH_CHECK(false, op, ": x is ", torch::headeronly::toString(type), ", expected ",
                  kExpected);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> quantize_per_token(const Tensor& x) {
  check_rows(kOp, x);
  QuantizedTensors out(x, x.size(0), x.size(1));
  if (x.size(0) > 0) quantize(kOp, x, out.rows());
  return {out.codes, out.scale, out.row_sum};
}

std::tuple<Tensor, Tensor, Tensor> quantize_for_experts(const Tensor& x, const Tensor& rows,
                                                        int64_t tile, const Tensor& tile_expert) {
  check_rows(kExpertsOp, x);
  STD_TORCH_CHECK(rows.dim() == 2 && tile_expert.dim() == 1, kExpertsOp, ": rows is ",
                  shape_text(rows), " and tile_expert ", shape_text(tile_expert),
                  ", expected [tokens, experts of a token] and [tiles]");
  STD_TORCH_CHECK(std::ranges::count(w4a8::kExpertTiles, tile) == 1, kExpertsOp, ": tiles of ",
                  tile, " rows, expected 16, 64 or 128");
  const int device = device_of(x);
  check_tensor(kExpertsOp, "rows", rows, device, ScalarType::Int, {x.size(0), rows.size(1)}, 4);
  QuantizedTensors out(x, tile * tile_expert.size(0), x.size(1));
  if (x.size(0) > 0)
    quantize(kExpertsOp, x,
             RowsOfExperts{out.rows(), static_cast<const int32_t*>(rows.data_ptr()),
                           static_cast<int>(rows.size(1))});
  return {out.codes, out.scale, out.row_sum};
}

}  // namespace qoq
