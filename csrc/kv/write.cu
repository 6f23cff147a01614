// Host side of the quantized cache's writes: checks and launch.
#include <torch/csrc/stable/ops.h>

#include "common/launch.h"
#include "kv/host.h"
#include "kv/write.cuh"
#include "ops.h"

namespace qoq {
namespace {

using namespace kv;

constexpr const char* kOp = "kv_write";

template <class P>
void launch_write(const WriteParams& p, cudaStream_t stream) {
  const int64_t threads = int64_t{p.tokens} * p.kv_heads * kWriteLanes<P>;
  const int64_t blocks = (threads + kWriteThreads - 1) / kWriteThreads;
  launch_early<kv_write_kernel<P>>(static_cast<int>(blocks), kWriteThreads, 0, stream, p);
}

// Refuses all but contiguous float32 [KV heads, head size], which is read 16 bytes at a time.
const float* checked_mean(const Tensor& mean, int64_t kv_heads, int64_t head_size, int device) {
  STD_TORCH_CHECK(mean.scalar_type() == ScalarType::Float && mean.dim() == 2 &&
                      mean.size(0) == kv_heads && mean.size(1) == head_size && mean.is_contiguous(),
                  kOp, ": k_mean is ", type_text(mean), " ", shape_text(mean),
                  ", expected contiguous Float [", kv_heads, ", ", head_size, "]");
  check_device(kOp, "k_mean", mean, device);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(mean.data_ptr()) % 16 == 0, kOp,
                  ": k_mean does not begin at a multiple of 16 bytes; clone it");
  return static_cast<const float*>(mean.data_ptr());
}

}  // namespace

void kv_write(const Tensor& key, const Tensor& value, const Tensor& slots, int64_t k_bits,
              int64_t v_bits, bool hadamard, Tensor cache, const std::optional<Tensor>& k_mean) {
  const int device = device_of(cache);
  check_heads(kOp, "key", key, device);
  check_heads(kOp, "value", value, device);
  const int64_t kv_heads = key.size(1), head_size = key.size(2);
  const int page_tokens = check_cache(kOp, cache, head_size, k_bits, v_bits);
  STD_TORCH_CHECK(value.scalar_type() == key.scalar_type() && value.size(0) == key.size(0) &&
                      value.size(1) == kv_heads && value.size(2) == head_size,
                  kOp, ": value is ", type_text(value), " ", shape_text(value), ", but key is ",
                  type_text(key), " ", shape_text(key));
  check_rotation(kOp, hadamard, head_size);
  STD_TORCH_CHECK(cache.size(1) == kv_heads, kOp, ": key has ", kv_heads, " heads, but the cache ",
                  cache.size(1));
  // A padded key has more rows than slots.
  STD_TORCH_CHECK(slots.scalar_type() == ScalarType::Long && slots.dim() == 1 &&
                      slots.is_contiguous() && slots.size(0) <= key.size(0),
                  kOp, ": slots is ", type_text(slots), " ", shape_text(slots),
                  ", expected contiguous Long of at most ", key.size(0));
  check_device(kOp, "slots", slots, device);
  const float* mean = k_mean ? checked_mean(*k_mean, kv_heads, head_size, device) : nullptr;
  const int64_t tokens = slots.size(0);
  if (tokens == 0 || cache.size(0) == 0) return;
  STD_TORCH_CHECK(tokens * kv_heads < int64_t{1} << 25, kOp, ": ", tokens, " tokens are too many");
  const WriteParams params{
      .key = key.data_ptr(),
      .value = value.data_ptr(),
      .slots = static_cast<const int64_t*>(slots.data_ptr()),
      .k_mean = mean,
      .cache = static_cast<uint8_t*>(cache.data_ptr()),
      .key_stride = key.stride(0),
      .key_head_stride = key.stride(1),
      .value_stride = value.stride(0),
      .value_head_stride = value.stride(1),
      .block_stride = cache.stride(0),
      .head_stride = cache.stride(1),
      .slot_count = cache.size(0) * page_tokens,
      .tokens = static_cast<int>(tokens),
      .kv_heads = static_cast<int>(kv_heads),
      .page_tokens = page_tokens,
      .is_bfloat16 = key.scalar_type() == ScalarType::BFloat16,
      .is_rotated = hadamard,
  };
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  dispatch_page(head_size, k_bits, v_bits, [&]<class P>() { launch_write<P>(params, stream); });
}

}  // namespace qoq
