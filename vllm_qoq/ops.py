"""The ops `qoq::*`: schemas, fakes and CPU implementations. Kernels add the CUDA key.

Defined in Python, so that they exist, trace and run on the CPU in every build. What
they compute is in `reference`. A build with VLLM_QOQ_CUDA=1 has `_C.so` beside this file,
which is loaded where torch has CUDA; a library that cannot be loaded is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.library import Library, register_fake

from vllm_qoq import reference, w4a8_layout
from vllm_qoq.packing import unpack_nibbles

_HALVES = (torch.bfloat16, torch.float16)
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
HOPPER = (9, 0)


def has_kernels(device_type: str) -> bool:
    """Whether this build computes the ops on this machine's "cpu" or "cuda"."""
    key = _DISPATCH_KEYS.get(device_type)
    if key is None or not all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"qoq::{name}", key) for name in _OPS
    ):
        return False
    # The kernels are compiled for sm_90a, which no other generation runs.
    return device_type != "cuda" or (
        torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER
    )


BUILD = "VLLM_QOQ_CUDA=1 pip install --no-build-isolation --no-deps --force-reinstall ."


def missing_kernels() -> str:
    """Why `has_kernels("cuda")` is false here, and what to do: the end of a refusal."""
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability()) != HOPPER:
        name = torch.cuda.get_device_name()
        return (
            f"our kernels are for Hopper, compute capability 9.0; {name} has {found[0]}.{found[1]}"
        )
    return (
        "this build of vllm-qoq has no CUDA kernels; on a Hopper GPU build them in a clone, with "
        f"nvcc: {BUILD} (README, Install)"
    )


@cache
def workspace(device: torch.device) -> torch.Tensor:
    """Where the blocks of one GEMM on `device` add up what they share: int32, all zero.

    Every GEMM leaves it zero, so all layers use the same one; two GEMMs that run at the same
    time in two streams need one each. The sizes are those of csrc/w4a8_gemm_config.h.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return torch.zeros(1024 + processors * 256 * 128, dtype=torch.int32, device=device)


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.quantize_per_token`: x [M, K] to codes int8, scale float32, row sum int32."""
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"quantize_per_token: x is {_text(x)}, expected floats [M, K]")
    return reference.quantize_per_token(x)


def add_rms_norm_quantize(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.add_rms_norm_quantize`: codes, scale, row sum, and x + residual.

    x, residual [M, K] and weight [K], all bfloat16 or all float16.
    """
    is_right = x.ndim == 2 and residual.shape == x.shape and weight.shape == x.shape[1:]
    if not is_right or not x.dtype == residual.dtype == weight.dtype or x.dtype not in _HALVES:
        raise ValueError(
            f"add_rms_norm_quantize: x is {_text(x)}, residual {_text(residual)} and weight "
            f"{_text(weight)}, expected [M, K], [M, K] and [K], all bfloat16 or all float16"
        )
    return reference.add_rms_norm_quantize(x, residual, weight, epsilon)


def silu_and_mul_quantize(
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.silu_and_mul_quantize`: x [M, 2 K], bfloat16 or float16, gate beside up."""
    if x.ndim != 2 or x.shape[1] % 2 or x.dtype not in _HALVES:
        raise ValueError(
            f"silu_and_mul_quantize: x is {_text(x)}, expected bfloat16 or float16 [M, 2 K]"
        )
    return reference.silu_and_mul_quantize(x)


def w4a8_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_row_sum: torch.Tensor,
    weight: torch.Tensor,
    channel_scale: torch.Tensor,
    channel_zero: torch.Tensor | None,
    group_scale: torch.Tensor | None,
    group_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    workspace: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    use_residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = dequant(x) @ dequant(weight).T + bias, [M, N] in `out_dtype`, bfloat16 or float16.

    x              int8 [M, K]             of quantize_per_token
    x_scale        float32 [M]
    x_row_sum      int32 [M]
    weight         uint8 [N, K / 2]        as stored (`vllm_qoq.format`), or
                   int8 [N, K]             reference.int8_weight of it, made once at load, or
                   uint8 [ceil(N / 64), K / 128, bytes]  w4a8_layout.pack of it with its groups
    channel_scale  float32 [N]
    channel_zero   float32 [N]             without groups
    group_scale    uint8 [N, K / 128]      with groups, and only with a stored weight
    group_offset   int8 [N, K / 128]
    bias           float [N]
    workspace      int32 [...]             of `workspace`, for CUDA
    residual       uint8 [N, K / 2]        of a nested set, beside a stored weight with groups, or
                   uint8 [ceil(N / 64), K / 128, 4096]  w4a8_layout.pack of it, beside a packed one
    use_residual   int32 [1]               beside a residual: 0 multiplies with the weight alone,
                                           anything else, and None, with both

    CUDA takes the packed weight alone, N a multiple of 8 and K of 128. It may start before the
    kernel ahead of it in the stream has ended, and reads `use_residual` at once: between it and
    what writes the flag another kernel is needed.
    """
    if x.ndim != 2 or channel_scale.ndim != 1:
        raise ValueError(
            f"w4a8_gemm: x is {_text(x)} and channel_scale {_text(channel_scale)}, "
            "expected int8 [M, K] and float32 [N]"
        )
    if out_dtype not in _HALVES:
        raise ValueError(f"w4a8_gemm: the output is bfloat16 or float16, not {out_dtype}")
    (m, k), n = x.shape, channel_scale.shape[0]
    _expect("x", x, torch.int8, m, k)
    _expect("x_scale", x_scale, torch.float32, m)
    _expect("x_row_sum", x_row_sum, torch.int32, m)
    _expect("channel_scale", channel_scale, torch.float32, n)
    if channel_zero is not None:
        _expect("channel_zero", channel_zero, torch.float32, n)
    if bias is not None:
        _expect("bias", bias, bias.dtype, n)
    if use_residual is not None:
        if residual is None:
            raise ValueError("w4a8_gemm: use_residual is given, but no residual")
        _expect("use_residual", use_residual, torch.int32, 1)
        residual = residual if int(use_residual) else None
    unpacked = _unpacked(weight, channel_zero, group_scale, group_offset, residual, n, k)
    accumulator = reference.int_matmul(x, unpacked)
    return reference.epilogue(
        accumulator, x_scale, channel_scale, x_row_sum, channel_zero, bias, out_dtype
    )


def _unpacked(
    weight: torch.Tensor,
    channel_zero: torch.Tensor | None,
    group_scale: torch.Tensor | None,
    group_offset: torch.Tensor | None,
    residual: torch.Tensor | None,
    n: int,
    k: int,
) -> torch.Tensor:
    """The int8 [N, K] that the codes are multiplied with."""
    if residual is not None and (channel_zero is not None or weight.dtype == torch.int8):
        raise ValueError("w4a8_gemm: a residual belongs to a weight with groups that is not int8")
    if weight.dtype == torch.int8:
        if group_scale is not None or group_offset is not None:
            raise ValueError("w4a8_gemm: an int8 weight has its groups in it already")
        _expect("weight", weight, torch.int8, n, k)
        return weight
    if weight.ndim == 3:
        if group_scale is not None or group_offset is not None:
            raise ValueError("w4a8_gemm: a packed weight has its groups in it already")
        _expect("weight", weight, torch.uint8, *_packed_shape(channel_zero is None, n, k))
        weight, group_scale, group_offset = w4a8_layout.unpack(weight, n)
        if residual is not None:
            _expect("residual", residual, torch.uint8, *_packed_shape(False, n, k))
            residual, _, _ = w4a8_layout.unpack(residual, n)
    if k % 2:
        raise ValueError(f"w4a8_gemm: {k} inputs, but a stored weight has two in a byte")
    _expect("weight", weight, torch.uint8, n, k // 2)
    if channel_zero is not None and group_scale is None and group_offset is None:
        return unpack_nibbles(weight)
    if channel_zero is not None or group_scale is None or group_offset is None:
        raise ValueError(
            "w4a8_gemm: a stored weight has either channel_zero or group_scale and group_offset"
        )
    groups = k // reference.GROUP_SIZE
    if k % reference.GROUP_SIZE:
        raise ValueError(f"w4a8_gemm: {k} inputs are not a multiple of {reference.GROUP_SIZE}")
    _expect("group_scale", group_scale, torch.uint8, n, groups)
    _expect("group_offset", group_offset, torch.int8, n, groups)
    if residual is None:
        return reference.level1_int8(weight, group_scale, group_offset)
    _expect("residual", residual, torch.uint8, n, k // 2)
    return reference.nested_int8(weight, group_scale, group_offset, residual)


def _packed_shape(is_grouped: bool, n: int, k: int) -> tuple[int, int, int]:
    blocks = -(-n // w4a8_layout.BLOCK_N)
    return blocks, k // w4a8_layout.BLOCK_K, w4a8_layout.packed_bytes(is_grouped)


def _expect(name: str, tensor: torch.Tensor, dtype: torch.dtype, *shape: int) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        expected = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
        raise ValueError(f"w4a8_gemm: {name} is {_text(tensor)}, expected {expected}")


def _text(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _quantized_fake(
    x: torch.Tensor, m: int, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        x.new_empty((m, k), dtype=torch.int8),
        x.new_empty((m,), dtype=torch.float32),
        x.new_empty((m,), dtype=torch.int32),
    )


def _quantize_per_token_fake(
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _quantized_fake(x, x.shape[0], x.shape[1])


def _add_rms_norm_quantize_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return *_quantized_fake(x, x.shape[0], x.shape[1]), x.new_empty(x.shape)


def _silu_and_mul_quantize_fake(
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _quantized_fake(x, x.shape[0], x.shape[1] // 2)


def _w4a8_gemm_fake(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_row_sum: torch.Tensor,
    weight: torch.Tensor,
    channel_scale: torch.Tensor,
    channel_zero: torch.Tensor | None,
    group_scale: torch.Tensor | None,
    group_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    workspace: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    use_residual: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], channel_scale.shape[0]), dtype=out_dtype)


_QUANTIZED = "Tensor codes, Tensor scale, Tensor row_sum"
# The schema of each op, its meaning and its fake.
_OPS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "quantize_per_token": (
        f"(Tensor x) -> ({_QUANTIZED})",
        quantize_per_token,
        _quantize_per_token_fake,
    ),
    "add_rms_norm_quantize": (
        f"(Tensor x, Tensor residual, Tensor weight, float epsilon) -> ({_QUANTIZED}, Tensor sum)",
        add_rms_norm_quantize,
        _add_rms_norm_quantize_fake,
    ),
    "silu_and_mul_quantize": (
        f"(Tensor x) -> ({_QUANTIZED})",
        silu_and_mul_quantize,
        _silu_and_mul_quantize_fake,
    ),
    "w4a8_gemm": (
        "(Tensor x, Tensor x_scale, Tensor x_row_sum, Tensor weight, Tensor channel_scale, "
        "Tensor? channel_zero, Tensor? group_scale, Tensor? group_offset, Tensor? bias, "
        "ScalarType out_dtype, Tensor? workspace=None, Tensor? residual=None, "
        "Tensor? use_residual=None) -> Tensor",
        w4a8_gemm,
        _w4a8_gemm_fake,
    ),
}
# The ops live as long as this object.
_library = Library("qoq", "DEF")
for _name, (_schema, _implementation, _fake) in _OPS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _implementation, "CPU")
    register_fake(f"qoq::{_name}", _fake, lib=_library)

_LIBRARY = Path(__file__).with_name("_C.so")
# It links torch's CUDA libraries, which a CPU build of torch has not.
if _LIBRARY.exists() and torch.version.cuda is not None:
    torch.ops.load_library(_LIBRARY)
