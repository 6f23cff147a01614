"""What the ops refuse: on the CPU here, on a GPU in test_gpu_refusals.py, in the same words."""

import re

import pytest
import torch
from conftest import ROOT
from op_refusals import call, refusals, right_arguments

CSRC = ROOT / "csrc"
CPU = torch.device("cpu")
# What only a broken driver or another GPU says.
UNPROVOKED = (
    *("the NVIDIA driver has no", "cuTensorMapEncodeTiled returned", "#call"),
    *("a GPU of compute capability", "of shared memory, and a block on this GPU"),
)
ON_CPU = [
    ("quantize_per_token", "grouped"),
    ("silu_and_mul_quantize", "grouped"),
    ("add_rms_norm_quantize", "grouped"),
    *(("w4a8_gemm", weights) for weights in ("grouped", "channel", "nested")),
    *((op, "grouped") for op in ("route_to_experts", "quantize_for_experts")),
    *((op, "grouped") for op in ("silu_and_mul_quantize_experts", "combine_experts")),
    *(("w4a8_gemm_experts", weights) for weights in ("grouped", "channel", "nested")),
]


@pytest.mark.parametrize(("op", "weights"), ON_CPU)
def test_right_arguments_are_taken(op, weights):
    call(op, right_arguments(op, CPU, weights))


@pytest.mark.parametrize("refusal", refusals("cpu"), ids=lambda r: f"{r.op}-{r.name}")
def test_a_fault_is_named(refusal):
    with pytest.raises(ValueError) as error:
        call(refusal.op, refusal.arguments(CPU))
    assert refusal.message in str(error.value)


def test_a_flag_may_be_the_second_of_two():
    arguments = right_arguments("w4a8_gemm", CPU, "nested")
    flags = torch.tensor([1, 0], dtype=torch.int32)
    one, other = (call("w4a8_gemm", arguments | {"use_residual": f}) for f in flags.split(1))
    assert not torch.equal(one, other)


def test_rows_may_have_gaps():
    wide = torch.randn(4, 300).bfloat16()
    rows = wide[:, 1:257]
    for op in ("quantize_per_token", "silu_and_mul_quantize"):
        got, expected = (call(op, {"x": x}) for x in (rows, rows.clone()))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_every_check_of_the_kernels_has_a_case():
    messages = [refusal.message for refusal in refusals("cuda")]
    checks = [check for path in sorted(CSRC.rglob("*.*")) for check in _checks(path)]
    assert len(checks) > 40
    missing = [
        check
        for check in checks
        if not any(_longest_literal(check) in message for message in messages)
        and not any(known in check for known in UNPROVOKED)
    ]
    assert not missing


def _checks(path):
    """The arguments of every STD_TORCH_CHECK of a source."""
    if path.suffix not in (".cu", ".cuh", ".h", ".cpp"):
        return
    text = path.read_text()
    for found in re.finditer(r"STD_TORCH_CHECK\(", text):
        depth, is_quoted = 1, False
        for end in range(found.end(), len(text)):
            character = text[end]
            if character == '"' and text[end - 1] != "\\":
                is_quoted = not is_quoted
            elif not is_quoted:
                depth += {"(": 1, ")": -1}.get(character, 0)
            if depth == 0:
                break
        yield text[found.end() : end]


def _longest_literal(check):
    """Of the message's literal parts, of which neighbours are one."""
    joined = re.sub(r'"\s*\n?\s*"', "", check)
    return max(re.findall(r'"([^"]*)"', joined), key=len, default="").removeprefix(": ")
