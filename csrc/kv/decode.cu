// Host side of the decode attention: checks and launch.
#include <cuda_runtime.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <numbers>

#include "common/card.h"
#include "common/launch.h"
#include "kv/decode_kernel.cuh"
#include "kv/host.h"
#include "ops.h"

namespace qoq {
namespace {

using namespace kv;

constexpr const char* kOp = "kv_decode";
// What a block may have at least and at most on the GPUs that the kernels are for.
constexpr int kLeastSharedBytes = 99 << 10, kMostSharedBytes = 227 << 10;

template <class A>
void launch_decode(Params& p, const Tensor& workspace, int device, cudaStream_t stream) {
  const Card& card = card_of(device);
  const int processors = card.multiprocessors, shared_bytes = A::shared_bytes(p.group);
  STD_TORCH_CHECK(shared_bytes <= card.shared_bytes, kOp, ": these heads need ", shared_bytes,
                  " bytes of shared memory, and a block on this GPU has at most ",
                  card.shared_bytes);
  constexpr int kReserved = 1024;  // bytes of each block
  const int room = card.multiprocessor_shared_bytes / (shared_bytes + kReserved);
  const int resident = std::clamp(room, 1, blocks_of_processor<A>(p, processors));
  const int blocks = std::min(kMaxBlocks, processors * resident);
  const int64_t ints = kMaxBlocks + int64_t{blocks} * 2 * p.group * A::kPartial;
  STD_TORCH_CHECK(workspace.numel() >= ints, kOp, ": the workspace has ", workspace.numel(),
                  " integers, expected at least ", ints, " (kv_ops.workspace)");
  static std::once_flag is_set[kMaxDevices];
  std::call_once(is_set[device], [&] {
    CHECK_CUDA(cudaFuncSetAttribute(kv_decode_kernel<A>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    std::min(A::shared_bytes(kMaxGroup), card.shared_bytes)));
  });
  lay_out<A>(p, blocks, resident);
  launch_early<kv_decode_kernel<A>>(blocks, A::kThreads, shared_bytes, stream, p);
}

// Only what some GPU needs is compiled.
template <class P, int kHeadTiles>
void dispatch_warps(Params& p, const Tensor& workspace, int device, cudaStream_t stream) {
  using Most = Attention<P, kHeadTiles, kMostWarps>;
  using Fewest = Attention<P, kHeadTiles, kFewestWarps>;
  if constexpr (Most::shared_bytes(kHeadTiles * kHeadsOfTile) <= kLeastSharedBytes) {
    launch_decode<Most>(p, workspace, device, stream);
  } else if constexpr (Most::shared_bytes(1) > kMostSharedBytes) {
    launch_decode<Fewest>(p, workspace, device, stream);
  } else if (Most::shared_bytes(p.group) <= card_of(device).shared_bytes) {
    launch_decode<Most>(p, workspace, device, stream);
  } else {
    launch_decode<Fewest>(p, workspace, device, stream);
  }
}

template <class P>
void dispatch_group(Params& p, const Tensor& workspace, int device, cudaStream_t stream) {
  if constexpr (has_one_tile(P::kHeadSize)) {
    dispatch_warps<P, 1>(p, workspace, device, stream);
  } else if (p.group <= kHeadsOfTile) {
    dispatch_warps<P, 1>(p, workspace, device, stream);
  } else {
    dispatch_warps<P, 2>(p, workspace, device, stream);
  }
}

// Refuses all but contiguous sinks [query heads] of the type of q.
void check_sinks(const Tensor& sinks, const Tensor& q, int device) {
  STD_TORCH_CHECK(sinks.scalar_type() == q.scalar_type() && sinks.dim() == 1 &&
                      sinks.size(0) == q.size(1) && sinks.is_contiguous(),
                  kOp, ": sinks is ", type_text(sinks), " ", shape_text(sinks),
                  ", expected contiguous ", type_text(q), " [", q.size(1), "]");
  check_device(kOp, "sinks", sinks, device);
}

}  // namespace

void kv_decode(const Tensor& q, const Tensor& cache, const Tensor& block_table,
               const Tensor& seq_lens, double scale, int64_t k_bits, int64_t v_bits, int64_t window,
               bool hadamard, Tensor out, Tensor workspace, double soft_cap,
               const std::optional<Tensor>& sinks) {
  const int device = device_of(cache);
  check_heads(kOp, "q", q, device);
  check_heads(kOp, "out", out, device);
  const int64_t sequences = q.size(0), heads = q.size(1), head_size = q.size(2);
  const int page_tokens = check_cache(kOp, cache, head_size, k_bits, v_bits);
  STD_TORCH_CHECK(out.scalar_type() == q.scalar_type() && out.size(0) == sequences &&
                      out.size(1) == heads && out.size(2) == head_size,
                  kOp, ": out is ", type_text(out), " ", shape_text(out), ", but q is ",
                  type_text(q), " ", shape_text(q));
  const int64_t kv_heads = cache.size(1);
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0 && heads <= kMaxGroup * kv_heads, kOp, ": ",
                  heads, " query heads for ", kv_heads, " KV heads, expected 1 to ", kMaxGroup,
                  " for each");
  check_rotation(kOp, hadamard, head_size);
  const int64_t group = heads / kv_heads;
  const int head_shift = has_one_tile(head_size) && group > kHeadsOfTile ? 1 : 0;
  STD_TORCH_CHECK(head_shift == 0 || group % 2 == 0, kOp, ": ", group, " query heads of size ",
                  head_size, " for a KV head, expected 1 to ", kHeadsOfTile,
                  " or an even number up to ", kMaxGroup);
  check_block_table(kOp, block_table, sequences, device);
  check_ints(kOp, "seq_lens", seq_lens, sequences, device);
  STD_TORCH_CHECK(scale > 0, kOp, ": scale is ", scale, ", expected a positive number");
  STD_TORCH_CHECK(window >= 0 && window < int64_t{1} << 31, kOp, ": window is ", window,
                  ", expected 0 (all tokens) or more");
  STD_TORCH_CHECK(soft_cap >= 0, kOp, ": soft_cap is ", soft_cap,
                  ", expected 0 (not capped) or a positive number");
  if (sinks) check_sinks(*sinks, q, device);
  const int64_t max_tokens = block_table.size(1) * page_tokens;
  const int64_t tiles = (sequences * kv_heads << head_shift) * (max_tokens / kTileTokens + 1);
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
  if (sequences == 0) return;
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
      .kv_heads = static_cast<int>(kv_heads << head_shift),
      .group = static_cast<int>(group >> head_shift),
      .head_shift = head_shift,
      .page_tokens = page_tokens,
      .max_tokens = static_cast<int>(max_tokens),
      .window = static_cast<int>(window),
      .scale_log2 = static_cast<float>(scale * std::numbers::log2e),
      .cap_log2 = static_cast<float>(soft_cap * std::numbers::log2e),
      .cap_exponent = soft_cap > 0 ? static_cast<float>(2 / soft_cap) : 0,
      .sinks = sinks ? sinks->data_ptr() : nullptr,
      .is_bfloat16 = q.scalar_type() == ScalarType::BFloat16,
      .is_rotated = hadamard,
  };
  // A rotation's 1 / sqrt(head size) is left to the scores.
  if (hadamard) params.scale_log2 /= std::sqrt(static_cast<float>(head_size));
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  dispatch_page(head_size, k_bits, v_bits,
                [&]<class P>() { dispatch_group<P>(params, workspace, device, stream); });
}

}  // namespace qoq
