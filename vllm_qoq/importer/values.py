"""Numbers that no converter writes, refused by the name of their tensor."""

from __future__ import annotations

import torch

from vllm_qoq.checkpoint.folder import TensorInfo
from vllm_qoq.errors import FormatError


def damaged(info: TensorInfo, what: str) -> FormatError:
    """The error for a tensor whose numbers cannot be."""
    return FormatError(f"{info.file}: {info.name}: {what}; download or convert the model again")


def check_finite(info: TensorInfo, values: torch.Tensor) -> torch.Tensor:
    """`values`, which are those of the tensor, unless one is NaN or infinite."""
    if not values.isfinite().all():
        raise damaged(info, "holds NaN or infinity")
    return values


def check_scale(info: TensorInfo, values: torch.Tensor) -> torch.Tensor:
    """The same for scales, which must be positive, too."""
    check_finite(info, values)
    if not (values > 0).all():
        raise damaged(info, "holds a scale that is not positive")
    return values


def to_half(info: TensorInfo, values: torch.Tensor) -> torch.Tensor:
    """`values` in float16, in which QServe's models run, if it can hold them."""
    check_finite(info, values)
    half = values.to(torch.float16)
    if not half.isfinite().all():
        raise damaged(info, "holds a number beyond float16")
    return half
