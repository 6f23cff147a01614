// What the host code of the KV cache's kernels shares: checks of the cache.
#pragma once

#include "common/checks.h"
#include "kv/page.h"

namespace qoq::kv {

inline bool is_16_bits(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::BFloat16 || tensor.scalar_type() == ScalarType::Half;
}

inline const char* type_text(const Tensor& tensor) {
  return torch::headeronly::toString(tensor.scalar_type());
}

inline void check_device(const char* op, const char* name, const Tensor& tensor, int device) {
  STD_TORCH_CHECK(tensor.is_cuda() && device_of(tensor) == device, op, ": ", name,
                  " is not on CUDA device ", device, ", where the cache is");
}

// Refuses all but heads of bfloat16 or float16 [rows, heads, head size] that can be read or written
// 8 bytes at a time.
inline void check_heads(const char* op, const char* name, const Tensor& tensor, int device) {
  STD_TORCH_CHECK(is_16_bits(tensor) && tensor.dim() == 3, op, ": ", name, " is ",
                  type_text(tensor), " ", shape_text(tensor),
                  ", expected BFloat16 or Half [rows, heads, head size]");
  check_device(op, name, tensor, device);
  const bool is_aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 8 == 0 &&
                          tensor.stride(0) % 4 == 0 && tensor.stride(1) % 4 == 0;
  STD_TORCH_CHECK(tensor.numel() == 0 || (tensor.stride(2) == 1 && is_aligned), op,
                  ": the heads of ", name,
                  " are not contiguous, or do not begin at multiples of 8 bytes; clone it");
}

// Refuses all but uint8 [blocks, KV heads, bytes of a page], each page in one piece. Returns the
// tokens of a page.
inline int check_cache(const char* op, const Tensor& cache, int64_t head_size, int64_t k_bits,
                       int64_t v_bits) {
  const bool is_served = (k_bits == 4 || k_bits == 8) && (v_bits == 4 || v_bits == k_bits);
  STD_TORCH_CHECK(is_served, op, ": keys of ", k_bits, " bits and values of ", v_bits,
                  ", expected 4 and 4, 8 and 8, or 8 and 4");
  STD_TORCH_CHECK(head_size == 64 || head_size == 96 || head_size == 128 || head_size == 256, op,
                  ": the head size is ", head_size, ", expected 64, 96, 128 or 256");
  const int64_t token_bytes = head_size * (k_bits + v_bits) / 8 + 2 * kScaleBytes;
  STD_TORCH_CHECK(cache.scalar_type() == ScalarType::Byte && cache.dim() == 3, op,
                  ": the cache is ", type_text(cache), " ", shape_text(cache),
                  ", expected Byte [blocks, KV heads, bytes of a page]");
  const int64_t bytes = cache.size(2);
  STD_TORCH_CHECK(bytes > 0 && bytes % (token_bytes * kTokenMultiple) == 0 && bytes < 1 << 30, op,
                  ": the cache is ", shape_text(cache), ", but a page of keys of ", k_bits,
                  " bits, values of ", v_bits, " and heads of ", head_size, " has ", token_bytes,
                  " bytes a token, for a multiple of ", kTokenMultiple, " tokens");
  const bool is_aligned = reinterpret_cast<uintptr_t>(cache.data_ptr()) % 16 == 0 &&
                          cache.stride(0) % 16 == 0 && cache.stride(1) % 16 == 0;
  STD_TORCH_CHECK(cache.is_cuda() && cache.stride(2) == 1 && is_aligned, op,
                  ": pages of the cache are not contiguous CUDA memory, or do not begin at "
                  "multiples of 16 bytes");
  return static_cast<int>(bytes / token_bytes);
}

inline void check_rotation(const char* op, bool is_rotated, int64_t head_size) {
  STD_TORCH_CHECK(!is_rotated || (head_size & (head_size - 1)) == 0, op,
                  ": a Hadamard rotation of ", head_size, " channels; it needs a power of two");
}

// Calls `function` for the Page of a head size and bits that `check_cache` let pass. The head sizes
// are those of vllm_qoq/ops/kv_ops.py.
template <class Function>
void dispatch_page(int64_t head_size, int64_t k_bits, int64_t v_bits, const Function& function) {
  auto dispatch_bits = [&]<int kHeadSize>() {
    if (k_bits == 4) {
      function.template operator()<Page<kHeadSize, 4, 4>>();
    } else if (v_bits == 4) {
      function.template operator()<Page<kHeadSize, 8, 4>>();
    } else {
      function.template operator()<Page<kHeadSize, 8, 8>>();
    }
  };
  if (head_size == 128) {
    dispatch_bits.template operator()<128>();
  } else if (head_size == 256) {
    dispatch_bits.template operator()<256>();
  } else if (head_size == 96) {
    dispatch_bits.template operator()<96>();
  } else {
    dispatch_bits.template operator()<64>();
  }
}

// Refuses all but int32 [count]. It is read 4 bytes at a time, so it may be a slice.
inline void check_ints(const char* op, const char* name, const Tensor& tensor, int64_t count,
                       int device) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int && tensor.dim() == 1 &&
                      tensor.size(0) == count && tensor.is_contiguous(),
                  op, ": ", name, " is ", type_text(tensor), " ", shape_text(tensor),
                  ", expected contiguous Int [", count, "]");
  check_device(op, name, tensor, device);
}

// Refuses all but int32 [sequences, blocks of the longest] with each row in one piece.
inline void check_block_table(const char* op, const Tensor& table, int64_t sequences, int device) {
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Int && table.dim() == 2 &&
                      table.size(0) == sequences && (table.numel() == 0 || table.stride(1) == 1),
                  op, ": block_table is ", type_text(table), " ", shape_text(table),
                  ", expected Int [", sequences, ", blocks] with contiguous rows");
  check_device(op, "block_table", table, device);
}

}  // namespace qoq::kv
