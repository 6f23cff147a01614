// Host side of the decode attention: checks.
#include <cuda_runtime.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <numbers>

#include "common/launch.h"
#include "kv/decode_launch.h"
#include "kv/host.h"
#include "ops.h"

namespace qoq {
namespace {

using namespace kv;

constexpr const char* kOp = kDecodeOp;

// Refuses all but contiguous sinks [query heads] of the type of q.
void check_sinks(const Tensor& sinks, const Tensor& q, int device) {
  STD_TORCH_CHECK(sinks.scalar_type() == q.scalar_type() && sinks.dim() == 1 &&
                      sinks.size(0) == q.size(1) && sinks.is_contiguous(),
                  kOp, ": sinks is ", type_text(sinks), " ", shape_text(sinks),
                  ", expected contiguous ", type_text(q), " [", q.size(1), "]");
  check_device(kOp, "sinks", sinks, device);
}

// Refuses all but one new token of each sequence without `query_start`, or several with it.
void check_queries(int64_t query_len, const std::optional<Tensor>& query_start, int64_t rows,
                   int64_t sequences, int device) {
  STD_TORCH_CHECK(query_len >= 1 && query_len <= kMaxQueryLen, kOp, ": query_len is ", query_len,
                  ", expected 1 to ", kMaxQueryLen);
  STD_TORCH_CHECK(query_start.has_value() == (query_len > 1), kOp, ": query_len is ", query_len,
                  query_start ? ", and query_start is for more" : ", which needs query_start");
  if (query_start) {
    check_ints(kOp, "query_start", *query_start, sequences + 1, device);
    STD_TORCH_CHECK(rows <= sequences * query_len, kOp, ": q has ", rows, " rows, but ", sequences,
                    " sequences of up to ", query_len, " new tokens have fewer");
  }
}

}  // namespace

void kv_decode(const Tensor& q, const Tensor& cache, const Tensor& block_table,
               const Tensor& seq_lens, double scale, int64_t k_bits, int64_t v_bits, int64_t window,
               bool hadamard, Tensor out, Tensor workspace, double soft_cap,
               const std::optional<Tensor>& sinks, int64_t query_len,
               const std::optional<Tensor>& query_start) {
  const int device = device_of(cache);
  check_heads(kOp, "q", q, device);
  check_heads(kOp, "out", out, device);
  const int64_t rows = q.size(0), heads = q.size(1), head_size = q.size(2);
  const int page_tokens = check_cache(kOp, cache, head_size, k_bits, v_bits);
  STD_TORCH_CHECK(out.scalar_type() == q.scalar_type() && out.size(0) == rows &&
                      out.size(1) == heads && out.size(2) == head_size,
                  kOp, ": out is ", type_text(out), " ", shape_text(out), ", but q is ",
                  type_text(q), " ", shape_text(q));
  const int64_t kv_heads = cache.size(1);
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0 && heads <= kMaxGroup * kv_heads, kOp, ": ",
                  heads, " query heads for ", kv_heads, " KV heads, expected 1 to ", kMaxGroup,
                  " for each");
  check_rotation(kOp, hadamard, head_size);
  const int64_t group = heads / kv_heads;
  STD_TORCH_CHECK(!has_one_tile(head_size) || group <= kHeadsOfTile || group % 2 == 0, kOp, ": ",
                  group, " query heads of size ", head_size, " for a KV head, expected 1 to ",
                  kHeadsOfTile, " or an even number up to ", kMaxGroup);
  const int64_t sequences = query_start ? seq_lens.numel() : rows;
  check_queries(query_len, query_start, rows, sequences, device);
  const Columns columns = columns_of(head_size, group, query_len);
  check_block_table(kOp, block_table, sequences, device);
  check_ints(kOp, "seq_lens", seq_lens, sequences, device);
  STD_TORCH_CHECK(scale > 0, kOp, ": scale is ", scale, ", expected a positive number");
  STD_TORCH_CHECK(window >= 0 && window < int64_t{1} << 31, kOp, ": window is ", window,
                  ", expected 0 (all tokens) or more");
  STD_TORCH_CHECK(soft_cap >= 0, kOp, ": soft_cap is ", soft_cap,
                  ", expected 0 (not capped) or a positive number");
  if (sinks) check_sinks(*sinks, q, device);
  const int64_t max_tokens = block_table.size(1) * page_tokens;
  const int64_t tiles = (sequences * kv_heads << columns.shift) * (max_tokens / kTileTokens + 1);
  const bool is_divisible = max_tokens / kTokenMultiple * page_tokens / kTokenMultiple < 1 << 30;
  const int64_t block_bytes = kv_heads * cache.stride(1);
  STD_TORCH_CHECK(block_bytes < int64_t{1} << 31, kOp, ": ", kv_heads, " KV heads, ",
                  cache.stride(1), " bytes apart, are too far apart");
  STD_TORCH_CHECK(max_tokens < 1 << 30 && tiles < 1 << 30 && is_divisible, kOp, ": ", sequences,
                  " sequences of up to ", max_tokens, " tokens are too many");
  STD_TORCH_CHECK(workspace.scalar_type() == ScalarType::Int && workspace.is_contiguous() &&
                      reinterpret_cast<uintptr_t>(workspace.data_ptr()) % 16 == 0,
                  kOp, ": the workspace is not contiguous Int at a multiple of 16 bytes");
  check_device(kOp, "the workspace", workspace, device);
  if (rows == 0) return;
  auto* counters = static_cast<int32_t*>(workspace.data_ptr());
  Params params{
      .q = q.data_ptr(),
      .cache = static_cast<const uint8_t*>(cache.data_ptr()),
      .block_table = static_cast<const int32_t*>(block_table.data_ptr()),
      .seq_lens = static_cast<const int32_t*>(seq_lens.data_ptr()),
      .out = out.data_ptr(),
      .counters = counters,
      .partials = reinterpret_cast<float*>(counters + kMaxBlocks),
      .q_stride = q.stride(0),
      .q_head_stride = q.stride(1),
      .out_stride = out.stride(0),
      .out_head_stride = out.stride(1),
      .block_stride = cache.stride(0),
      .head_stride = static_cast<int>(cache.stride(1)),
      .table_stride = block_table.stride(0),
      .sequences = static_cast<int>(sequences),
      .kv_heads = static_cast<int>(kv_heads << columns.shift),
      .group = columns.count,
      .head_shift = columns.shift,
      .page_tokens = page_tokens,
      .max_tokens = static_cast<int>(max_tokens),
      .window = static_cast<int>(window),
      .scale_log2 = static_cast<float>(scale * std::numbers::log2e),
      .cap_log2 = static_cast<float>(soft_cap * std::numbers::log2e),
      .cap_exponent = soft_cap > 0 ? static_cast<float>(2 / soft_cap) : 0,
      .sinks = sinks ? sinks->data_ptr() : nullptr,
      .is_bfloat16 = q.scalar_type() == ScalarType::BFloat16,
      .is_rotated = hadamard,
      .query_start = query_start ? static_cast<const int32_t*>(query_start->data_ptr()) : nullptr,
      .rows = static_cast<int>(rows),
      .query_len = static_cast<int>(query_len),
      .heads_of_kv = static_cast<int>(group),
      .inverse_heads = static_cast<uint32_t>(((1 << 16) + group - 1) / group),
  };
  // A rotation's 1 / sqrt(head size) is left to the scores.
  if (hadamard) params.scale_log2 /= std::sqrt(static_cast<float>(head_size));
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  (query_start ? launch_many : launch_one)(params, {head_size, k_bits, v_bits}, workspace, device,
                                           stream);
}

}  // namespace qoq
