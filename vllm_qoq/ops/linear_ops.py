"""The ops of a linear layer: quantizing activations, and the GEMM over QoQ weights.

What they compute is in `vllm_qoq.numerics.reference`. The CPU and the kernels refuse the same
arguments in the same words: with ValueError here, with RuntimeError in a kernel.
"""

from __future__ import annotations

from functools import cache

import torch

from vllm_qoq.numerics import GROUP_SIZES, group_count, group_size_of, reference
from vllm_qoq.numerics.packing import unpack_nibbles
from vllm_qoq.ops import w4a8_layout
from vllm_qoq.ops.checks import HALVES, check_rows, check_tensor, type_text
from vllm_qoq.ops.library import define

_GEMM = "w4a8_gemm"
# csrc/gemm/w4a8_config.h has these numbers, too: the largest sizes, and the workspace's integers.
MAX_K = 1 << 16
MAX_ROWS = 1 << 24
WORKSPACE_COUNTERS = 1024
WORKSPACE_SUMS_OF_PROCESSOR = 256 * 128


@cache
def workspace(device: torch.device, owner: str = "layers") -> torch.Tensor:
    """Make the buffer in which the blocks of a GEMM add up what they share: int32 zeros.

    Every GEMM leaves it zero, so all layers use the same one; two GEMMs that run at the same
    time in two streams need one each, of another `owner`. vLLM runs shared experts beside routed
    ones.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    integers = WORKSPACE_COUNTERS + processors * WORKSPACE_SUMS_OF_PROCESSOR
    return torch.zeros(integers, dtype=torch.int32, device=device)


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize x [M, K] to codes int8 [M, K], scale float32 [M] and row sum int32 [M].

    `reference.quantize_per_token` computes it. x is bfloat16, float16 or float32; its rows are
    contiguous, and may have gaps between them.
    """
    check_rows("quantize_per_token", x, *HALVES, torch.float32)
    return reference.quantize_per_token(x)


def add_rms_norm_quantize(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add, normalize and quantize: returns codes, scale, row sum, and x + residual.

    `reference.add_rms_norm_quantize` computes it. x and residual are [M, K] and weight is [K], all
    bfloat16 or all float16. The last two are contiguous; so is each row of x.
    """
    op = "add_rms_norm_quantize"
    check_rows(op, x, *HALVES)
    check_tensor(op, "residual", residual, x.dtype, *x.shape)
    check_tensor(op, "weight", weight, x.dtype, x.shape[1])
    return reference.add_rms_norm_quantize(x, residual, weight, epsilon)


def silu_and_mul_quantize(
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Multiply silu(gate) with up and quantize the product: returns codes, scale and row sum.

    `reference.silu_and_mul_quantize` computes it. x is [M, 2 K], gate beside up, bfloat16 or
    float16; its rows are contiguous, and may have gaps between them.
    """
    op = "silu_and_mul_quantize"
    check_rows(op, x, *HALVES)
    if x.shape[1] % 2:
        raise ValueError(f"{op}: x is {list(x.shape)}, expected gate and up side by side, [M, 2 K]")
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
    """Compute y = dequant(x) @ dequant(weight).T + bias, [M, N] in `out_dtype`.

    x              int8 [M, K]             what quantize_per_token returns, with the next two
    x_scale        float32 [M]
    x_row_sum      int32 [M]
    weight         uint8 [N, K / 2]        as stored (`vllm_qoq.checkpoint.format`), or
                   int8 [N, K]             reference.int8_weight of it, made once at load, or
                   uint8 [ceil(N / 64), K / 128, bytes]  w4a8_layout.pack of it with its groups
    channel_scale  float32 [N]
    channel_zero   float32 [N]             without groups
    group_scale    uint8 [N, ceil(K / G)]  with groups of G inputs, and only with a stored weight
    group_offset   int8 [N, ceil(K / G)]
    bias           float [N]               float32, bfloat16 or float16
    out_dtype                              bfloat16 or float16
    workspace      int32 [...]             the buffer that `workspace` makes, for CUDA
    residual       uint8 [N, K / 2]        a nested set's, beside a stored weight with groups, or
                   uint8 [ceil(N / 64), K / 128, 4096]  w4a8_layout.pack of it, beside a packed one
    use_residual   int32 [1]               beside a residual: 0 multiplies with the weight alone,
                                           anything else, and None, with both

    All tensors are contiguous and begin at multiples of 16 bytes, `use_residual` of 4. N is a
    multiple of 8, K one of 128 up to 65536, M and N are at most 2^24.

    CUDA takes the packed weight alone, and needs the workspace. It may start before the kernel
    ahead of it in the stream has ended, and reads `use_residual` at once: between it and what
    writes the flag another kernel is needed. The CPU takes stored and int8 weights as well, with
    any N, and any K that the stored form has, and does not look at the workspace.
    """
    if x.ndim != 2 or channel_scale.ndim != 1:
        raise ValueError(
            f"{_GEMM}: x is {list(x.shape)} and channel_scale {list(channel_scale.shape)}, "
            "expected [M, K] and [N]"
        )
    if out_dtype not in HALVES:
        raise ValueError(f"{_GEMM}: the output is bfloat16 or float16, not {type_text(out_dtype)}")
    (m, k), n = x.shape, channel_scale.shape[0]
    if _is_packed(weight):
        _check_packed(n, k, group_scale, group_offset)
    # Sums in int32 are exact up to this K: 255 * 128 * K < 2^31.
    if k > MAX_K:
        raise ValueError(f"{_GEMM}: K={k} overflows int32; split the layer")
    if max(m, n) > MAX_ROWS:
        raise ValueError(f"{_GEMM}: M={m}, N={n} are too large")
    check_tensor(_GEMM, "x", x, torch.int8, m, k)
    check_tensor(_GEMM, "x_scale", x_scale, torch.float32, m)
    check_tensor(_GEMM, "x_row_sum", x_row_sum, torch.int32, m)
    check_tensor(_GEMM, "channel_scale", channel_scale, torch.float32, n)
    if channel_zero is not None:
        check_tensor(_GEMM, "channel_zero", channel_zero, torch.float32, n)
    if bias is not None:
        check_tensor(_GEMM, "bias", bias, bias.dtype, n)
        if bias.dtype not in (torch.float32, *HALVES):
            raise ValueError(
                f"{_GEMM}: bias is {type_text(bias.dtype)}, expected Float, BFloat16 or Half"
            )
    if residual is not None:
        _check_residual(residual, weight, channel_zero, n, k)
    if use_residual is not None:
        if residual is None:
            raise ValueError(f"{_GEMM}: use_residual is given, but no residual")
        check_tensor(_GEMM, "use_residual", use_residual, torch.int32, 1, alignment=4)
        residual = residual if int(use_residual) else None
    if weight.dtype == torch.int8:
        unpacked = _already_int8(weight, group_scale, group_offset, n, k)
    elif _is_packed(weight):
        shape = _packed_shape(n, k, _group_size(weight) if channel_zero is None else 0)
        check_tensor(_GEMM, "weight", weight, torch.uint8, *shape)
        stored = w4a8_layout.unpack(weight, n)
        residual = residual if residual is None else w4a8_layout.unpack(residual, n)[0]
        unpacked = _unpacked(*stored, residual)
    else:
        _check_stored(weight, channel_zero, group_scale, group_offset, n, k)
        unpacked = _unpacked(weight, group_scale, group_offset, residual)
    accumulator = reference.int_matmul(x, unpacked)
    return reference.epilogue(
        accumulator, x_scale, channel_scale, x_row_sum, channel_zero, bias, out_dtype
    )


def _is_packed(weight: torch.Tensor) -> bool:
    """Whether `weight` is packed: stored and int8 weights are matrices."""
    return weight.ndim != 2


def _check_packed(
    n: int, k: int, group_scale: torch.Tensor | None, group_offset: torch.Tensor | None
) -> None:
    """Raise ValueError for sizes and arguments that a packed weight cannot have."""
    if n % 8 or n == 0:
        raise ValueError(f"{_GEMM}: N={n} must be a multiple of 8")
    if k % w4a8_layout.BLOCK_K or k == 0:
        raise ValueError(f"{_GEMM}: K={k} must be a multiple of {w4a8_layout.BLOCK_K}")
    if group_scale is not None or group_offset is not None:
        raise ValueError(f"{_GEMM}: a packed weight has its groups in it already")


def _check_residual(
    residual: torch.Tensor,
    weight: torch.Tensor,
    channel_zero: torch.Tensor | None,
    n: int,
    k: int,
) -> None:
    """Raise ValueError unless the residual is in the form of the weight, which has groups."""
    if channel_zero is not None:
        raise ValueError(f"{_GEMM}: a residual belongs to a weight with groups")
    if weight.dtype == torch.int8:
        raise ValueError(f"{_GEMM}: an int8 weight has its residual in it already")
    shape = _packed_shape(n, k, group_size=0) if _is_packed(weight) else (n, k // 2)
    check_tensor(_GEMM, "residual", residual, torch.uint8, *shape)


def _check_stored(
    weight: torch.Tensor,
    channel_zero: torch.Tensor | None,
    group_scale: torch.Tensor | None,
    group_offset: torch.Tensor | None,
    n: int,
    k: int,
) -> None:
    """Raise ValueError unless the weight is [N, K / 2], with either its zeros or its groups."""
    if k % 2:
        raise ValueError(f"{_GEMM}: {k} inputs, but a stored weight has two in a byte")
    check_tensor(_GEMM, "weight", weight, torch.uint8, n, k // 2)
    if channel_zero is not None and group_scale is None and group_offset is None:
        return
    if channel_zero is not None or group_scale is None or group_offset is None:
        raise ValueError(
            f"{_GEMM}: a stored weight has either channel_zero or group_scale and group_offset"
        )
    found = group_size_of(k, group_scale.shape[-1]) if group_scale.ndim else None
    groups = group_count(k, found or GROUP_SIZES[0])
    check_tensor(_GEMM, "group_scale", group_scale, torch.uint8, n, groups)
    check_tensor(_GEMM, "group_offset", group_offset, torch.int8, n, groups)


def _already_int8(
    weight: torch.Tensor,
    group_scale: torch.Tensor | None,
    group_offset: torch.Tensor | None,
    n: int,
    k: int,
) -> torch.Tensor:
    if group_scale is not None or group_offset is not None:
        raise ValueError(f"{_GEMM}: an int8 weight has its groups in it already")
    check_tensor(_GEMM, "weight", weight, torch.int8, n, k)
    return weight


def _unpacked(
    weight: torch.Tensor,
    group_scale: torch.Tensor | None,
    group_offset: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Unpack a stored weight to the int8 [N, K] that the codes are multiplied with."""
    if group_scale is None or group_offset is None:
        return unpack_nibbles(weight)
    if residual is None:
        return reference.level1_int8(weight, group_scale, group_offset)
    return reference.nested_int8(weight, group_scale, group_offset, residual)


def _group_size(packed: torch.Tensor) -> int:
    """The group size of a packed weight with groups, or the largest where none is like it."""
    return w4a8_layout.group_size_of_block(packed.shape[-1] if packed.ndim else 0) or GROUP_SIZES[0]


def _packed_shape(n: int, k: int, group_size: int) -> tuple[int, int, int]:
    blocks = -(-n // w4a8_layout.BLOCK_N)
    return blocks, k // w4a8_layout.BLOCK_K, w4a8_layout.block_bytes(group_size)


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
define(
    "quantize_per_token",
    f"(Tensor x) -> ({_QUANTIZED})",
    fake=_quantize_per_token_fake,
    cpu=quantize_per_token,
)
define(
    "add_rms_norm_quantize",
    f"(Tensor x, Tensor residual, Tensor weight, float epsilon) -> ({_QUANTIZED}, Tensor sum)",
    fake=_add_rms_norm_quantize_fake,
    cpu=add_rms_norm_quantize,
)
define(
    "silu_and_mul_quantize",
    f"(Tensor x) -> ({_QUANTIZED})",
    fake=_silu_and_mul_quantize_fake,
    cpu=silu_and_mul_quantize,
)
define(
    _GEMM,
    "(Tensor x, Tensor x_scale, Tensor x_row_sum, Tensor weight, Tensor channel_scale, "
    "Tensor? channel_zero, Tensor? group_scale, Tensor? group_offset, Tensor? bias, "
    "ScalarType out_dtype, Tensor? workspace=None, Tensor? residual=None, "
    "Tensor? use_residual=None) -> Tensor",
    fake=_w4a8_gemm_fake,
    cpu=w4a8_gemm,
)
