"""The meaning of the QoQ tensors and ops, in plain PyTorch.

It is the CPU path of the plugin and the oracle of the kernels. Accumulation is exact
int32; the epilogue is float32, rounded once to the output's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch

from vllm_qoq.numerics import group_size_of
from vllm_qoq.numerics.packing import unpack_nibbles

INT8_MAX = 127
GROUP_SCALE_MAX = 16
# Stored residuals 0..15 stand for -8..7.
RESIDUAL_ZERO = 8
# The smallest scale of a token, so that a token of zeros does not divide by zero.
MIN_SCALE = 1e-10


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize activations to symmetric int8 with one scale a token.

    x  [M, K] float  ->  codes int8 [M, K] in -127..127, scale float32 [M], row sum of the
    codes int32 [M]. x is about codes * scale; ties round to even.
    """
    x = x.float()
    scale = (x.abs().amax(dim=-1) / INT8_MAX).clamp_min(MIN_SCALE)
    codes = (x / scale[:, None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return codes, scale, codes.sum(dim=-1, dtype=torch.int32)


def add_rms_norm_quantize(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize RMSNorm(x + residual) per token, and return the sum x + residual as well.

    x, residual [M, K] and weight [K] have one dtype, as in vLLM's fused_add_rms_norm, with its
    roundings: the norm reads the sum before it is rounded, and rounds before the product with
    the weight and after it.
    """
    total = x.float() + residual.float()
    unit = total * torch.rsqrt(total.square().mean(dim=-1, keepdim=True) + epsilon)
    normed = unit.to(x.dtype) * weight
    return *quantize_per_token(normed), total.to(x.dtype)


def silu_and_mul_quantize(
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize silu(gate) * up, which is float32, per token; x [M, 2 K] is gate beside up."""
    gate, up = x.float().chunk(2, dim=-1)
    return quantize_per_token(torch.nn.functional.silu(gate) * up)


def level1_int8(
    qweight: torch.Tensor, group_scale: torch.Tensor, group_offset: torch.Tensor
) -> torch.Tensor:
    """Compute W8 = q * group_scale + group_offset, int8 [N, K].

    qweight uint8 [N, K / 2], group_scale uint8 and group_offset int8 [N, ceil(K / G)], with
    G a group size, which follows from these shapes.
    Raises ValueError, beginning with the tensor's name, for a number of groups that no group size
    gives, for a group_scale outside 1..16 and where a weight leaves int8, which no valid
    checkpoint does.
    """
    if group_scale.numel():
        low, high = int(group_scale.min()), int(group_scale.max())
        if low < 1 or high > GROUP_SCALE_MAX:
            raise ValueError(f"group_scale: from {low} to {high}, outside 1..{GROUP_SCALE_MAX}")
    codes = unpack_nibbles(qweight).to(torch.int16)
    n, k = codes.shape
    group_size = group_size_of(k, group_scale.shape[1])
    if group_size is None:
        raise ValueError(f"group_scale: {group_scale.shape[1]} groups of {k} inputs")
    if k % group_size:  # a code of 0 stands for the offset, so what pads the last group is an int8
        codes = torch.nn.functional.pad(codes, (0, -k % group_size))
    groups = codes.view(n, group_scale.shape[1], group_size)
    weight = groups * group_scale.to(torch.int16)[:, :, None] + group_offset[:, :, None]
    if weight.numel() and (int(weight.min()) < -128 or int(weight.max()) > 127):
        raise ValueError("group_offset: q * group_scale + group_offset leaves the range of int8")
    return weight.flatten(1)[:, :k].to(torch.int8).contiguous()


def nested_int8(
    qweight: torch.Tensor,
    group_scale: torch.Tensor,
    group_offset: torch.Tensor,
    qresidual: torch.Tensor,
) -> torch.Tensor:
    """Compute W8 = level1_int8 + qresidual - 8, int8 [N, K]; qresidual uint8 [N, K / 2].

    Raises ValueError where `level1_int8` does, and where the sum leaves int8.
    """
    level1 = level1_int8(qweight, group_scale, group_offset)
    weight = level1.to(torch.int16) + unpack_nibbles(qresidual).to(torch.int16) - RESIDUAL_ZERO
    if weight.numel() and (int(weight.min()) < -128 or int(weight.max()) > 127):
        raise ValueError("qresidual: with the base's weights it leaves the range of int8")
    return weight.to(torch.int8)


def int8_weight(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Compute what a layer's tensors (`checkpoint.format`) multiply activations with: int8 [N, K].

    It is level 1 of a layer with groups, plus the residual of a nested set if `qresidual` is among
    the tensors, and the codes 0..15 of a layer without groups. Raises ValueError where
    `nested_int8` does.
    """
    if "channel_zero" in tensors:
        return unpack_nibbles(tensors["qweight"]).view(torch.int8)
    groups = tensors["qweight"], tensors["group_scale"], tensors["group_offset"]
    return (
        nested_int8(*groups, tensors["qresidual"])
        if "qresidual" in tensors
        else level1_int8(*groups)
    )


def int_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply exactly: a int8 [M, K] @ b.T, where b is int8 or uint8 [N, K], is int32 [M, N]."""
    if b.dtype == torch.uint8:  # codes 0..15 are int8 as well
        b = b.view(torch.int8)
    m, k, n = a.shape[0], a.shape[1], b.shape[0]
    if 0 in (m, k, n):
        return torch.zeros(m, n, dtype=torch.int32, device=a.device)
    # torch 2.13.0 leaves the result unwritten on the CPU where k is 1.
    if a.device.type != "cpu" or (k > 1 and _cpu_has_int8_products()):
        return torch._int_mm(a, b.t())
    total = torch.zeros(m, n, dtype=torch.int32)
    for start in range(0, k, _EXACT_IN_FLOAT32):
        part = slice(start, start + _EXACT_IN_FLOAT32)
        total += (a[:, part].float() @ b[:, part].float().t()).to(torch.int32)
    return total


# 1024 products of two int8 add up to at most 2**24, so float32 holds every partial sum.
_EXACT_IN_FLOAT32 = 1024


@cache
def _cpu_has_int8_products() -> bool:
    """Whether torch._int_mm is fast and can be trusted on this CPU, which takes VNNI on x86.

    Without, it takes up to thirty times as long as float32, or it saturates: oneDNN adds two
    products in 16 bits (vpmaddubsw). Seen with torch 2.13.0, the latter also on a CPU with VNNI,
    under ONEDNN_MAX_CPU_ISA=AVX2 and AVX512_CORE.
    """
    if not torch.cpu._is_vnni_supported():
        return False
    row = torch.full((1, 64), INT8_MAX, dtype=torch.int8)
    return int(torch._int_mm(row, row.t())) == row.numel() * INT8_MAX**2


def epilogue(
    accumulator: torch.Tensor,
    token_scale: torch.Tensor,
    channel_scale: torch.Tensor,
    row_sum: torch.Tensor,
    channel_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Turn the accumulator, int32 [M, N], into the layer's output [M, N] in `dtype`.

    y = token_scale * (accumulator * channel_scale - row_sum * channel_zero) + bias, in float32.
    """
    y = accumulator.float() * channel_scale
    if channel_zero is not None:
        y = y - row_sum.float()[:, None] * channel_zero
    y = y * token_scale[:, None]
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)


def dequantize(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Compute the weight, float32 [N, K], that a layer's tensors stand for."""
    weight = int8_weight(tensors).float() * tensors["channel_scale"].float()[:, None]
    if "channel_zero" in tensors:
        weight -= tensors["channel_zero"].float()[:, None]
    return weight
