"""The inner loops of rounding, in the form for each device.

All of them work in units of codes, in which rounding takes the nearest integer between two
bounds, and on a block of columns at a time. Rows need nothing of each other.
"""

from __future__ import annotations

from typing import Protocol

import torch

from vllm_qoq.errors import reason
from vllm_qoq.numerics import GROUP_SIZES
from vllm_qoq.quantizer import QuantizeError, rounding_plain
from vllm_qoq.quantizer.rounding_plain import Bound

WIDTH = 128
"""Columns of a block where nothing else decides it."""


class Rounding(Protocol):
    """The functions that this module and `rounding_triton` have."""

    def search(
        self, level1: torch.Tensor, cost: torch.Tensor, scales_below: int, shifts: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `search` of `rounding_plain`."""

    def round_columns(
        self, ideal: torch.Tensor, lower: torch.Tensor, low: Bound, high: Bound
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `round_columns` of `rounding_plain`."""

    def descend(
        self,
        codes: torch.Tensor,
        gradient: torch.Tensor,
        hessian: torch.Tensor,
        low: Bound,
        high: Bound,
    ) -> torch.Tensor:
        """See `descend` of `rounding_plain`."""


def on(device: torch.device, columns: int = WIDTH) -> Rounding:
    """Choose the form for a device: Triton on CUDA, PyTorch elsewhere.

    columns  those of a block; PyTorch rounds the last one of a layer where it has another number
             than a group may have
    """
    if device.type == "cuda" and columns in GROUP_SIZES:
        from vllm_qoq.quantizer import rounding_triton

        return rounding_triton
    return rounding_plain


def require(device: torch.device) -> None:
    """Raise QuantizeError unless the form for the device runs.

    Triton builds its kernels when they are first called.
    """
    level1, cost = torch.zeros(1, 1, 128, device=device), torch.ones(1, 128, device=device)
    try:
        on(device).search(level1, cost, scales_below=0, shifts=False)
    except Exception as error:  # Triton and the compiler that it calls raise anything.
        raise QuantizeError(
            f"Triton cannot build the quantizer's kernels for this GPU: {reason(error)}; install a "
            "C compiler (gcc), which it needs, or hide the GPU with CUDA_VISIBLE_DEVICES= and "
            "quantize on the CPU"
        ) from error
