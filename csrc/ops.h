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
               const std::optional<Tensor>& sinks);

void kv_write(const Tensor& key, const Tensor& value, const Tensor& slots, int64_t k_bits,
              int64_t v_bits, bool hadamard, Tensor cache, const std::optional<Tensor>& k_mean);

void kv_dequantize(const Tensor& cache, const Tensor& block_table, const Tensor& first_token,
                   const Tensor& row_start, int64_t k_bits, int64_t v_bits, bool hadamard,
                   Tensor key, Tensor value);

}  // namespace qoq
