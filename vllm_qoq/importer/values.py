"""Checks for numbers that no converter writes, which name the tensor."""

from __future__ import annotations

import torch

from vllm_qoq.checkpoint.folder import TensorInfo
from vllm_qoq.errors import FormatError


def damaged(info: TensorInfo, what: str) -> FormatError:
    """Make the error for a tensor whose numbers cannot be."""
    return FormatError(f"{info.file}: {info.name}: {what}; download or convert the model again")


def check_finite(info: TensorInfo, values: torch.Tensor) -> torch.Tensor:
    """Return the values of a tensor, or raise FormatError if one is NaN or infinite."""
    if not values.isfinite().all():
        raise damaged(info, "holds NaN or infinity")
    return values


def check_scale(info: TensorInfo, values: torch.Tensor) -> torch.Tensor:
    """Return the values of a scale, or raise FormatError unless all are finite and positive."""
    check_finite(info, values)
    if not (values > 0).all():
        raise damaged(info, "holds a scale that is not positive")
    return values


def to_half(info: TensorInfo, values: torch.Tensor) -> torch.Tensor:
    """Convert values to float16, in which QServe's models run; FormatError if one is beyond it."""
    check_finite(info, values)
    half = values.to(torch.float16)
    if not half.isfinite().all():
        raise damaged(info, "holds a number beyond float16")
    return half
