"""Products of float32 matrices, as exact as float32 makes them and as fast as a GPU allows.

Tensor cores take float32 numbers of 10 bits behind the point, TF32. A number is the sum of two of
them and of next to nothing, so three products of the halves make one of float32 (the fourth is
smaller than what float32 rounds off). That takes a third of the time of the float32 units.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PANEL = 1024
"""Columns that are added up at a time: tensor cores cut bits off a sum as it grows."""

_TF32_BITS = -(1 << 13)  # a mask, of all bits of a float32 but the last 13


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Compute left @ right of float32 [M, K] and [K, N]: float32 [M, N]."""
    if not left.is_cuda:
        return left @ right
    out = torch.zeros(len(left), right.shape[1], device=left.device)
    for first in range(0, len(right), PANEL):
        panel = slice(first, first + PANEL)
        add_product(out, left[:, panel], right[panel])
    return out


def add_product(
    out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float = 1.0
) -> None:
    """Add alpha * left @ right to `out` float32 [M, N]; `left` float32 [M, K] has few columns."""
    if not left.is_cuda:
        out.addmm_(left, right, alpha=alpha)
        return
    (left_high, left_low), (right_high, right_low) = _halves(left), _halves(right)
    with _tensor_cores():
        out.addmm_(left_high, right_low, alpha=alpha)
        out.addmm_(left_low, right_high, alpha=alpha)
        out.addmm_(left_high, right_high, alpha=alpha)


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split float32 numbers into two whose sum they are, the first one a TF32."""
    high = x.contiguous().view(torch.int32).bitwise_and(_TF32_BITS).view(torch.float32)
    return high, x - high


@contextmanager
def _tensor_cores() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
