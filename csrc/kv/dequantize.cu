// Host side of reading the quantized cache back: checks and launch.
#include <torch/csrc/stable/ops.h>

#include "common/launch.h"
#include "kv/dequantize.cuh"
#include "kv/host.h"
#include "ops.h"

namespace qoq {
namespace {

using namespace kv;

constexpr const char* kOp = "kv_dequantize";

template <class P>
void launch_dequantize(const DequantizeParams& p, cudaStream_t stream) {
  launch_early<kv_dequantize_kernel<P>>(divide_up(p.rows, kDequantizeRows), kDequantizeThreads, 0,
                                        stream, p);
}

void check_aligned(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0 &&
                      tensor.stride(0) % 8 == 0 && tensor.stride(1) % 8 == 0,
                  kOp, ": the heads of ", name, " do not begin at multiples of 16 bytes");
}

}  // namespace

void kv_dequantize(const Tensor& cache, const Tensor& block_table, const Tensor& first_token,
                   const Tensor& row_start, int64_t k_bits, int64_t v_bits, bool hadamard,
                   Tensor key, Tensor value) {
  const int device = device_of(cache);
  check_heads(kOp, "key", key, device);
  check_heads(kOp, "value", value, device);
  const int64_t rows = key.size(0), kv_heads = key.size(1), head_size = key.size(2);
  const int page_tokens = check_cache(kOp, cache, head_size, k_bits, v_bits);
  STD_TORCH_CHECK(value.scalar_type() == key.scalar_type() && value.size(0) == rows &&
                      value.size(1) == kv_heads && value.size(2) == head_size,
                  kOp, ": value is ", type_text(value), " ", shape_text(value), ", but key is ",
                  type_text(key), " ", shape_text(key));
  check_rotation(kOp, hadamard, head_size);
  STD_TORCH_CHECK(cache.size(1) == kv_heads, kOp, ": key has ", kv_heads, " heads, but the cache ",
                  cache.size(1));
  const int64_t sequences = first_token.numel();
  check_ints(kOp, "first_token", first_token, sequences, device);
  check_ints(kOp, "row_start", row_start, sequences + 1, device);
  check_block_table(kOp, block_table, sequences, device);
  const int64_t max_tokens = block_table.size(1) * page_tokens;
  STD_TORCH_CHECK(rows < 1 << 30 && max_tokens < 1 << 30, kOp, ": ", rows, " rows of up to ",
                  max_tokens, " tokens are too many");
  if (rows == 0 || sequences == 0) return;
  check_aligned("key", key);
  check_aligned("value", value);
  const DequantizeParams params{
      .cache = static_cast<const uint8_t*>(cache.data_ptr()),
      .block_table = static_cast<const int32_t*>(block_table.data_ptr()),
      .first_token = static_cast<const int32_t*>(first_token.data_ptr()),
      .row_start = static_cast<const int32_t*>(row_start.data_ptr()),
      .key = key.data_ptr(),
      .value = value.data_ptr(),
      .key_stride = key.stride(0),
      .key_head_stride = key.stride(1),
      .value_stride = value.stride(0),
      .value_head_stride = value.stride(1),
      .block_stride = cache.stride(0),
      .head_stride = cache.stride(1),
      .table_stride = block_table.stride(0),
      .sequences = static_cast<int>(sequences),
      .kv_heads = static_cast<int>(kv_heads),
      .page_tokens = page_tokens,
      .max_tokens = static_cast<int>(max_tokens),
      .rows = static_cast<int>(rows),
      .is_bfloat16 = key.scalar_type() == ScalarType::BFloat16,
      .is_rotated = hadamard,
  };
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  dispatch_page(head_size, k_bits, v_bits,
                [&]<class P>() { launch_dequantize<P>(params, stream); });
}

}  // namespace qoq
