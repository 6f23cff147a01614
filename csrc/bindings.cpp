// Adds the CUDA implementations to the ops that vllm_qoq/ops/ defines.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(qoq, CUDA, m) {
  m.impl("w4a8_gemm", TORCH_BOX(&qoq::w4a8_gemm));
  m.impl("w4a8_gemm_portable", TORCH_BOX(&qoq::w4a8_gemm_portable));
  m.impl("route_to_experts", TORCH_BOX(&qoq::route_to_experts));
  m.impl("quantize_for_experts", TORCH_BOX(&qoq::quantize_for_experts));
  m.impl("silu_and_mul_quantize_experts", TORCH_BOX(&qoq::silu_and_mul_quantize_experts));
  m.impl("w4a8_gemm_experts", TORCH_BOX(&qoq::w4a8_gemm_experts));
  m.impl("combine_experts", TORCH_BOX(&qoq::combine_experts));
  m.impl("mma_int8_operations", TORCH_BOX(&qoq::mma_int8_operations));
  m.impl("kv_decode", TORCH_BOX(&qoq::kv_decode));
  m.impl("kv_write", TORCH_BOX(&qoq::kv_write));
  m.impl("kv_dequantize", TORCH_BOX(&qoq::kv_dequantize));
  m.impl("quantize_per_token", TORCH_BOX(&qoq::quantize_per_token));
  m.impl("add_rms_norm_quantize", TORCH_BOX(&qoq::add_rms_norm_quantize));
  m.impl("silu_and_mul_quantize", TORCH_BOX(&qoq::silu_and_mul_quantize));
}
