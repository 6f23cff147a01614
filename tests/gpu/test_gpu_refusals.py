"""Every refusal of the CUDA ops is an exception in this process, and the ops work after it."""

import pytest
import torch
from op_refusals import call, refusals, right_arguments

from vllm_qoq import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ops.has_kernels("cuda"), reason="this build has no CUDA kernels (VLLM_QOQ_CUDA=1)"
    ),
]

DEVICE = torch.device("cuda", 0)
OPS = [
    ("quantize_per_token", "grouped"),
    ("silu_and_mul_quantize", "grouped"),
    ("add_rms_norm_quantize", "grouped"),
    *(("w4a8_gemm", weights) for weights in ("grouped", "channel", "nested")),
    *((op, "grouped") for op in ("route_to_experts", "quantize_for_experts")),
    *((op, "grouped") for op in ("silu_and_mul_quantize_experts", "combine_experts")),
    *(("w4a8_gemm_experts", weights) for weights in ("grouped", "channel", "nested")),
    ("kv_write", "grouped"),
    ("kv_decode", "grouped"),
    ("kv_dequantize", "grouped"),
]


@pytest.mark.parametrize(("op", "weights"), OPS)
def test_right_arguments_are_taken(op, weights):
    call(op, right_arguments(op, DEVICE, weights))


@pytest.mark.parametrize("refusal", refusals("cuda"), ids=lambda r: f"{r.op}-{r.name}")
def test_a_fault_is_named(refusal):
    with pytest.raises(RuntimeError) as error:
        call(refusal.op, refusal.arguments(DEVICE))
    assert refusal.message in str(error.value)
    # What was refused left nothing behind.
    call(refusal.op, right_arguments(refusal.op, DEVICE, refusal.weights))


def test_a_flag_may_be_the_second_of_two():
    arguments = right_arguments("w4a8_gemm", DEVICE, "nested")
    flags = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    one, other = (call("w4a8_gemm", arguments | {"use_residual": f}) for f in flags.split(1))
    assert not torch.equal(one, other)


def test_rows_may_have_gaps():
    wide = torch.randn(4, 300, device=DEVICE).bfloat16()
    rows = wide[:, 1:257]
    for op in ("quantize_per_token", "silu_and_mul_quantize"):
        got, expected = (call(op, {"x": x}) for x in (rows, rows.clone()))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
