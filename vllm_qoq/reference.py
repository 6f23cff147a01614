"""What the QoQ tensors and ops mean, in plain PyTorch.

The CPU path of the plugin and the oracle of the kernels. Accumulation is exact
int32; the epilogue is float32, rounded once to the output's dtype.
"""

from __future__ import annotations

import torch

from vllm_qoq.packing import unpack_nibbles

GROUP_SIZE = 128
INT8_MAX = 127
# The smallest scale of a token, so that a token of zeros does not divide by zero.
MIN_SCALE = 1e-10


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Symmetric int8 per token.

    x  [M, K] float  ->  codes int8 [M, K] in -127..127, scale float32 [M], row sum of the
    codes int32 [M]. x is about codes * scale; ties round to even.
    """
    x = x.float()
    scale = (x.abs().amax(dim=-1) / INT8_MAX).clamp_min(MIN_SCALE)
    codes = (x / scale[:, None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return codes, scale, codes.sum(dim=-1, dtype=torch.int32)


def level1_int8(
    qweight: torch.Tensor, group_scale: torch.Tensor, group_offset: torch.Tensor
) -> torch.Tensor:
    """W8 = q * group_scale + group_offset, int8 [N, K].

    qweight uint8 [N, K / 2], group_scale uint8 and group_offset int8 [N, K / 128].
    Raises ValueError where a weight leaves int8, which no valid checkpoint does.
    """
    codes = unpack_nibbles(qweight).to(torch.int16)
    n, k = codes.shape
    groups = codes.view(n, k // GROUP_SIZE, GROUP_SIZE)
    weight = groups * group_scale.to(torch.int16)[:, :, None] + group_offset[:, :, None]
    if weight.numel() and (int(weight.min()) < -128 or int(weight.max()) > 127):
        raise ValueError("q * group_scale + group_offset leaves the range of int8")
    return weight.view(n, k).to(torch.int8)


def int_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a int8 [M, K] @ b.T, b int8 or uint8 [N, K], exactly: int32 [M, N]."""
    if b.dtype == torch.uint8:  # codes 0..15 are int8 as well
        b = b.view(torch.int8)
    if 0 in (a.shape[0], a.shape[1], b.shape[0]):
        return torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    return torch._int_mm(a, b.t())


def epilogue(
    accumulator: torch.Tensor,
    token_scale: torch.Tensor,
    channel_scale: torch.Tensor,
    row_sum: torch.Tensor,
    channel_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """int32 [M, N] to the layer's output [M, N] in `dtype`.

    y = token_scale * (accumulator * channel_scale - row_sum * channel_zero) + bias, in float32.
    """
    y = accumulator.float() * channel_scale
    if channel_zero is not None:
        y = y - row_sum.float()[:, None] * channel_zero
    y = y * token_scale[:, None]
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)


def dequantize(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight that a layer's tensors (`vllm_qoq.format`) stand for: float32 [N, K]."""
    scale = tensors["channel_scale"].float()[:, None]
    if "channel_zero" in tensors:
        codes = unpack_nibbles(tensors["qweight"]).float()
        return codes * scale - tensors["channel_zero"].float()[:, None]
    grouped = (tensors[name] for name in ("qweight", "group_scale", "group_offset"))
    return level1_int8(*grouped).float() * scale
