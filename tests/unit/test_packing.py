"""The QoQ format's bits and the meaning of its ops: packing, levels, integer products."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_qoq import cards, kernel_library, ops
from vllm_qoq.numerics import GROUP_SIZES, group_count, group_size_of, reference
from vllm_qoq.numerics.packing import pack_nibbles, unpack_nibbles
from vllm_qoq.ops import w4a8_layout

settings.register_profile("tensors", deadline=None, max_examples=60)
settings.load_profile("tensors")
GROUP = 128
LIMITS = st.sampled_from([-128, -127, -1, 0, 1, 127])


def integers(seed, low, high, shape, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator, dtype=dtype)


def grouped_layer(seed, n, groups, group_size=GROUP):
    """Random tensors of a layer in which no weight leaves int8."""
    codes = integers(seed, 0, 15, (n, groups * group_size), torch.uint8)
    group_scale = integers(seed + 1, 1, 16, (n, groups), torch.int64)
    offset = integers(seed + 2, 0, 1 << 20, (n, groups), torch.int64)
    group_offset = -128 + offset % (256 - 15 * group_scale)
    return {
        "qweight": pack_nibbles(codes),
        "channel_scale": torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 1e-3,
        "group_scale": group_scale.to(torch.uint8),
        "group_offset": group_offset.to(torch.int8),
    }


def code(tensors, row, column):
    """One code, by the words of the format: the even k is in the low nibble."""
    byte = int(tensors["qweight"][row, column // 2])
    return byte // 16 if column % 2 else byte % 16


seeds = st.integers(0, 2**31 - 10)


@given(seeds, st.lists(st.integers(0, 5), max_size=2), st.integers(0, 40))
def test_packing_and_unpacking_are_exact_inverses(seed, leading, pairs):
    codes = integers(seed, 0, 15, (*leading, 2 * pairs), torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (*leading, pairs) and packed.dtype == torch.uint8
    assert torch.equal(unpack_nibbles(packed), codes)
    every_byte = integers(seed, 0, 255, (*leading, pairs), torch.uint8)
    assert torch.equal(pack_nibbles(unpack_nibbles(every_byte)), every_byte)


@given(seeds, st.sampled_from([torch.int8, torch.int32, torch.int64]))
def test_codes_of_any_integer_dtype_are_packed(seed, dtype):
    codes = integers(seed, 0, 15, (3, 8), dtype)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes.to(torch.uint8))


@given(st.integers(0, 4), st.integers(0, 20))
def test_an_odd_number_of_codes_is_refused(rows, pairs):
    with pytest.raises(ValueError, match=f"{2 * pairs + 1} codes in a row"):
        pack_nibbles(torch.zeros(rows, 2 * pairs + 1, dtype=torch.uint8))


@given(seeds, st.sampled_from([-128, -1, 16, 127]), st.integers(0, 23))
def test_a_code_that_does_not_fit_is_refused(seed, wrong, place):
    codes = integers(seed, 0, 15, (3, 8), torch.int8)
    codes.view(-1)[place] = wrong
    with pytest.raises(ValueError, match=r"4 bits hold 0\.\.15"):
        pack_nibbles(codes)


def test_only_bytes_are_unpacked():
    with pytest.raises(ValueError, match=r"not torch\.int8"):
        unpack_nibbles(torch.zeros(2, 2, dtype=torch.int8))


@settings(max_examples=10)
@given(seeds, st.integers(0, 3), st.integers(1, 2), st.sampled_from(GROUP_SIZES))
@example(seed=1, n=2, groups=3, size=32)
@example(seed=1, n=2, groups=3, size=64)
def test_both_levels_equal_a_loop_over_the_weights(seed, n, groups, size):
    tensors = grouped_layer(seed, n, groups, size)
    level1 = reference.int8_weight(tensors)
    whole = reference.dequantize(tensors)
    assert level1.shape == whole.shape == (n, groups * size)
    for row in range(n):
        for column in range(groups * size):
            scale = int(tensors["group_scale"][row, column // size])
            offset = int(tensors["group_offset"][row, column // size])
            expected = code(tensors, row, column) * scale + offset
            assert int(level1[row, column]) == expected
            product = np.float32(expected) * tensors["channel_scale"][row].numpy()
            assert whole[row, column].numpy() == product


@settings(max_examples=10)
@given(seeds, st.integers(0, 3), st.integers(1, 20))
def test_a_channel_without_groups_equals_a_loop_over_the_weights(seed, n, pairs):
    random = torch.Generator().manual_seed(seed)
    tensors = {
        "qweight": integers(seed, 0, 255, (n, pairs), torch.uint8),
        "channel_scale": torch.rand(n, generator=random),
        "channel_zero": torch.randn(n, generator=random),
    }
    whole = reference.dequantize(tensors)
    for row in range(n):
        for column in range(2 * pairs):
            product = np.float32(code(tensors, row, column)) * tensors["channel_scale"][row].numpy()
            assert whole[row, column].numpy() == product - tensors["channel_zero"][row].numpy()


def test_the_group_size_follows_from_the_numbers_of_inputs_and_groups():
    for inputs in range(2, 1025, 2):
        for size in GROUP_SIZES:
            groups = group_count(inputs, size)
            assert groups == 1 or group_size_of(inputs, groups) == size
            assert group_size_of(inputs, groups) is not None
    assert group_size_of(256, 3) is None


def test_a_number_of_groups_that_no_size_gives_is_refused():
    tensors = grouped_layer(0, 3, 3, 64)
    tensors["qweight"] = tensors["qweight"][:, :64]
    with pytest.raises(ValueError, match="group_scale: 3 groups of 128 inputs"):
        reference.int8_weight(tensors)


@given(st.integers(0, 15), st.integers(1, 16), st.integers(-128, 127))
def test_a_weight_that_would_wrap_is_refused(largest, group_scale, group_offset):
    codes = torch.full((2, GROUP), 0, dtype=torch.uint8)
    codes[1, 77] = largest
    arguments = (
        pack_nibbles(codes),
        torch.full((2, 1), group_scale, dtype=torch.uint8),
        torch.full((2, 1), group_offset, dtype=torch.int8),
    )
    if largest * group_scale + group_offset > 127:
        with pytest.raises(ValueError, match=r"group_offset.*leaves the range of int8"):
            reference.level1_int8(*arguments)
    else:
        assert int(reference.level1_int8(*arguments)[1, 77]) == largest * group_scale + group_offset


@pytest.mark.parametrize("group_scale", [0, 17, 255])
def test_a_group_scale_out_of_range_is_refused(group_scale):
    tensors = grouped_layer(0, 3, 2)
    tensors["group_scale"][1, 1] = group_scale
    with pytest.raises(ValueError, match=r"group_scale: .* outside 1\.\.16"):
        reference.int8_weight(tensors)


@given(
    seeds,
    st.integers(0, 5),
    st.integers(1, 40),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_quantized_tokens_are_within_half_a_step(seed, m, k, dtype):
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    codes, scale, row_sum = reference.quantize_per_token(x)
    assert codes.dtype == torch.int8 and (codes.abs() <= 127).all()
    assert torch.equal(row_sum.long(), codes.long().sum(1)) and row_sum.dtype == torch.int32
    error = (codes.double() * scale.double()[:, None] - x.double()).abs()
    assert (error <= scale.double()[:, None] * (0.5 + 1e-4)).all()
    if m:
        assert (codes.abs().amax(1) == 127).logical_or(x.abs().amax(1) == 0).all()


def test_special_tokens_are_quantized():
    largest = torch.finfo(torch.bfloat16).max
    x = torch.tensor([[0.0, 0.0], [largest, -largest], [127.0, 0.5], [127.0, 1.5], [-127.0, -2.5]])
    codes, scale, row_sum = reference.quantize_per_token(x)
    assert codes.tolist() == [[0, 0], [127, -127], [127, 0], [127, 2], [-127, -2]]
    assert row_sum.tolist() == [0, 0, 127, 129, -129]
    assert scale.isfinite().all() and (scale > 0).all()
    assert scale[2:].tolist() == [1.0, 1.0, 1.0]


@given(seeds, st.integers(0, 5), st.integers(0, 5), st.integers(0, 300), LIMITS)
@example(seed=0, m=1, n=2, k=1, limit=-128)
def test_integer_products_are_exact(seed, m, n, k, limit):
    a = integers(seed, -128, 127, (m, k), torch.int8)
    b = integers(seed + 1, -128, 127, (n, k), torch.int8)
    a[: m // 2], b[: n // 2] = limit, limit
    assert torch.equal(reference.int_matmul(a, b).long(), a.long() @ b.long().t())
    codes = integers(seed, 0, 15, (n, k), torch.uint8)
    assert torch.equal(reference.int_matmul(a, codes).long(), a.long() @ codes.long().t())


SATURATING = """
import torch
from vllm_qoq.numerics import reference
for limits in [(-128, 127), (127, 127), (-128, -128)]:
    a, b = (torch.randint(limits[0], limits[1] + 1, (5, 3000), dtype=torch.int8) for _ in "ab")
    assert torch.equal(reference.int_matmul(a, b).long(), a.long() @ b.long().t()), limits
"""


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_integer_products_are_exact_on_a_processor_without_vnni(isa):
    """There torch._int_mm saturates: oneDNN adds two products in 16 bits."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", SATURATING], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def gemm_arguments(tensors, m, bias=None, dtype=torch.bfloat16):
    k = 2 * tensors["qweight"].shape[1]
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
    rest = (tensors.get(name) for name in ("channel_zero", "group_scale", "group_offset"))
    quantized = reference.quantize_per_token(x)
    return [*quantized, tensors["qweight"], tensors["channel_scale"], *rest, bias, dtype]


@pytest.mark.parametrize("is_grouped", [True, False])
def test_ops_are_registered_as_pytorch_expects(is_grouped):
    tensors = grouped_layer(3, 4, 2)
    if not is_grouped:
        del tensors["group_scale"], tensors["group_offset"]
        tensors["channel_zero"] = torch.randn(4)
    arguments = gemm_arguments(tensors, 3, torch.randn(4).bfloat16())
    x = torch.randn(3, 8).bfloat16()
    torch.library.opcheck(torch.ops.qoq.quantize_per_token.default, (x,))
    torch.library.opcheck(torch.ops.qoq.silu_and_mul_quantize.default, (x,))
    torch.library.opcheck(torch.ops.qoq.add_rms_norm_quantize.default, (x, x + 1, x[0], 1e-5))
    torch.library.opcheck(torch.ops.qoq.w4a8_gemm.default, tuple(arguments))


def nested_arguments(seed, m, use_residual, group_size=GROUP):
    """Arguments of a weight with groups and a residual, and the two int8 weights they mean."""
    tensors = grouped_layer(seed, 8, 256 // group_size, group_size)
    # So that 8 more or less is an int8 as well.
    tensors["group_offset"].clamp_(-100, 0)
    tensors["group_scale"].clamp_(max=6)
    residual = integers(seed + 1, 0, 255, tensors["qweight"].shape, torch.uint8)
    base = reference.int8_weight(tensors)
    nested = reference.int8_weight(tensors | {"qresidual": residual})
    arguments = gemm_arguments(tensors, m, torch.randn(8).bfloat16())
    return [*arguments, None, residual, use_residual], base, nested


@pytest.mark.parametrize(
    "flag, meant", [(0, "base"), (1, "nested"), (7, "nested"), (None, "nested")]
)
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_flag_leaves_the_residual_out(flag, meant, is_packed, group_size):
    use_residual = None if flag is None else torch.tensor([flag], dtype=torch.int32)
    arguments, base, nested = nested_arguments(11, 5, use_residual, group_size)
    alone = arguments[:11]
    alone[3], alone[6], alone[7] = base if flag == 0 else nested, None, None
    if is_packed:
        arguments[3] = w4a8_layout.pack(arguments[3], arguments[6], arguments[7])
        arguments[6], arguments[7] = None, None
        arguments[11] = w4a8_layout.pack(arguments[11])
    got = torch.ops.qoq.w4a8_gemm(*arguments)
    assert torch.equal(got, torch.ops.qoq.w4a8_gemm(*alone))
    assert not torch.equal(base, nested)
    if group_size == GROUP:
        torch.library.opcheck(torch.ops.qoq.w4a8_gemm.default, tuple(arguments))


@pytest.mark.parametrize(
    ("flag", "has_residual", "message"),
    [
        (torch.ones(1, dtype=torch.int32), False, "use_residual is given, but no residual"),
        (torch.ones(1, dtype=torch.int64), True, "use_residual is Long"),
        (torch.ones(2, dtype=torch.int32), True, r"use_residual is Int \[2\]"),
    ],
)
def test_a_flag_that_does_not_fit_is_refused(flag, has_residual, message):
    arguments, _, _ = nested_arguments(11, 2, flag)
    if not has_residual:
        arguments[11] = None
    with pytest.raises(ValueError, match=message):
        torch.ops.qoq.w4a8_gemm(*arguments)


@pytest.mark.parametrize("m", [0, 1, 5])
def test_a_weight_unpacked_at_load_gives_the_same(m):
    tensors = grouped_layer(4, 6, 2)
    arguments = gemm_arguments(tensors, m, torch.randn(6).bfloat16())
    stored = torch.ops.qoq.w4a8_gemm(*arguments)
    arguments[3], arguments[6], arguments[7] = reference.int8_weight(tensors), None, None
    assert stored.shape == (m, 6)
    assert torch.equal(torch.ops.qoq.w4a8_gemm(*arguments), stored)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(3, 256), "x is Float"),
        (0, torch.zeros(256, dtype=torch.int8), r"x is \[256\] and channel_scale \[4\]"),
        (1, torch.zeros(2), r"x_scale is Float \[2\], expected Float \[3\]"),
        (2, torch.zeros(3), "x_row_sum is Float"),
        (3, torch.zeros(4, 64, dtype=torch.uint8), r"weight is Byte \[4, 64\]"),
        (3, torch.zeros(4, 256, dtype=torch.int8), "has its groups in it"),
        (4, torch.zeros(4, dtype=torch.bfloat16), "channel_scale is BFloat16"),
        (5, torch.zeros(4), "either channel_zero or group_scale"),
        (6, None, "either channel_zero or group_scale"),
        (6, torch.ones(4, 1, dtype=torch.uint8), r"group_scale is Byte \[4, 1\]"),
        (6, torch.ones(4, 4, dtype=torch.uint8), r"group_offset is Char \[4, 2\], .* \[4, 4\]"),
        (7, torch.ones(4, 2), "group_offset is Float"),
        (8, torch.zeros(5), r"bias is Float \[5\]"),
        (9, torch.float32, "bfloat16 or float16"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(place, value, message):
    arguments = gemm_arguments(grouped_layer(5, 4, 2), 3)
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.qoq.w4a8_gemm(*arguments)


def test_tokens_that_are_no_matrix_of_floats_are_refused():
    integers = torch.zeros(2, 4, dtype=torch.int8)
    for x, message in ((torch.zeros(4), "expected floats"), (integers, "expected BFloat16")):
        with pytest.raises(ValueError, match=message):
            torch.ops.qoq.quantize_per_token(x)


def test_the_cpu_has_kernels_and_an_unknown_device_has_none():
    assert ops.has_kernels("cpu")
    assert not ops.has_kernels("xpu")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), False),
        ((8, 0), True),
        ((8, 9), True),
        ((9, 0), True),
        ((10, 3), True),
        ((12, 1), True),
        ((13, 0), True),
    ],
)
def test_the_cuda_kernels_are_for_some_gpus(monkeypatch, capability, expected):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    codes = cards.build_for("8.0;9.0;10.0;12.0+PTX").codes
    monkeypatch.setattr(kernel_library, "built_for", lambda: codes)
    assert ops.has_kernels("cuda") is expected


def test_a_library_for_other_gpus_is_no_library_here_and_says_what_is(monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L40S")
    monkeypatch.setattr(kernel_library, "built_for", lambda: ("sm_90", "sm_90a"))
    assert not ops.has_kernels("cuda")
    said = ops.missing_kernels()
    assert "built for sm_90, sm_90a; NVIDIA L40S has compute capability 8.9;" in said
    assert f"VLLM_QOQ_CUDA_ARCHS=8.9 {kernel_library.BUILD}" in said


LACKING = "qoq::quantize_per_token"


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_library_without_an_op_is_told_from_none(monkeypatch, has_gpu):
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: name != LACKING
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(kernel_library, "built_for", lambda: ("sm_90", "sm_90a"))
    assert not ops.has_kernels("cuda") and ops.missing_ops("cuda") == [LACKING]
    assert f"it lacks {LACKING}; build it anew" in ops.missing_kernels()
    monkeypatch.setattr(kernel_library, "built_for", lambda: None)
    assert "has no CUDA kernels" in ops.missing_kernels()
