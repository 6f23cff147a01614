// The CUDA implementations of the ops `qoq::*`. vllm_qoq/ops/ holds their schemas and says what
// they mean.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

namespace qoq {

using torch::stable::Tensor;

Tensor w4a8_gemm(const Tensor& x, const Tensor& x_scale, const Tensor& x_row_sum,
                 const Tensor& weight, const Tensor& channel_scale,
                 const std::optional<Tensor>& channel_zero,
                 const std::optional<Tensor>& group_scale,
                 const std::optional<Tensor>& group_offset, const std::optional<Tensor>& bias,
                 torch::headeronly::ScalarType out_dtype, const std::optional<Tensor>& workspace,
                 const std::optional<Tensor>& residual, const std::optional<Tensor>& use_residual);

// The same by the portable path on any GPU, as if it had no more shared memory for a block and no
// more multiprocessors. For tests, which give it a schema (tests/support/portable.py): without one,
// torch has no such op.
Tensor w4a8_gemm_portable(
    const Tensor& x, const Tensor& x_scale, const Tensor& x_row_sum, const Tensor& weight,
    const Tensor& channel_scale, const std::optional<Tensor>& channel_zero,
    const std::optional<Tensor>& group_scale, const std::optional<Tensor>& group_offset,
    const std::optional<Tensor>& bias, torch::headeronly::ScalarType out_dtype,
    const std::optional<Tensor>& workspace, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& use_residual, int64_t shared_bytes, int64_t multiprocessors);

// The experts of a layer; vllm_qoq/ops/expert_ops.py says what each of these does.
std::tuple<Tensor, Tensor, Tensor> route_to_experts(const Tensor& topk_ids,
                                                    const std::optional<Tensor>& expert_map,
                                                    int64_t experts, int64_t tile);
std::tuple<Tensor, Tensor, Tensor> quantize_for_experts(const Tensor& x, const Tensor& rows,
                                                        int64_t tile, const Tensor& tile_expert);
std::tuple<Tensor, Tensor, Tensor> silu_and_mul_quantize_experts(const Tensor& x,
                                                                 const Tensor& tiles, int64_t tile);
Tensor w4a8_gemm_experts(const Tensor& x, const Tensor& x_scale, const Tensor& x_row_sum,
                         const Tensor& tiles, const Tensor& tile_expert, int64_t experts,
                         const Tensor& weight, const Tensor& channel_scale,
                         const std::optional<Tensor>& channel_zero,
                         const std::optional<Tensor>& bias, torch::headeronly::ScalarType out_dtype,
                         const std::optional<Tensor>& workspace,
                         const std::optional<Tensor>& residual,
                         const std::optional<Tensor>& use_residual);
Tensor combine_experts(const Tensor& y, const Tensor& rows, const Tensor& topk_weights);

// Multiplies for a few milliseconds as fast as this GPU's mma does, and returns how many operations
// that is. `out` is int32 [1]. For `bench gemm`, which gives it a schema
// (vllm_qoq/bench/int8_rate.py).
int64_t mma_int8_operations(Tensor out);

std::tuple<Tensor, Tensor, Tensor> quantize_per_token(const Tensor& x);
std::tuple<Tensor, Tensor, Tensor> silu_and_mul_quantize(const Tensor& x);
std::tuple<Tensor, Tensor, Tensor, Tensor> add_rms_norm_quantize(const Tensor& x,
                                                                 const Tensor& residual,
                                                                 const Tensor& weight,
                                                                 double epsilon);

void kv_decode(const Tensor& q, const Tensor& cache, const Tensor& block_table,
               const Tensor& seq_lens, double scale, int64_t k_bits, int64_t v_bits, int64_t window,
               bool hadamard, Tensor out, Tensor workspace, double soft_cap,
               const std::optional<Tensor>& sinks, int64_t query_len,
               const std::optional<Tensor>& query_start);

void kv_write(const Tensor& key, const Tensor& value, const Tensor& slots, int64_t k_bits,
              int64_t v_bits, bool hadamard, Tensor cache, const std::optional<Tensor>& k_mean);

void kv_dequantize(const Tensor& cache, const Tensor& block_table, const Tensor& first_token,
                   const Tensor& row_start, int64_t k_bits, int64_t v_bits, bool hadamard,
                   Tensor key, Tensor value);

}  // namespace qoq
