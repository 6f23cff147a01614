"""Products of 16-bit floats on processors that have no instructions for them.

There PyTorch takes six times as long for them as for float32 ones, and calibration is little else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_HALF = (torch.bfloat16, torch.float16)
_PRODUCTS = frozenset(
    {
        *(functional.linear, functional.scaled_dot_product_attention),
        *(torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__),
    }
)


def fast_products() -> AbstractContextManager[object]:
    """A context in which a model's products on the CPU are as fast as the processor allows.

    Without instructions for 16-bit floats they are computed in float32 and rounded once, which is
    what these instructions do.
    """
    return nullcontext() if has_half_products() else _Float32Products()


def has_half_products() -> bool:
    """Whether this processor has instructions for products of 16-bit floats."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Float32Products(TorchFunctionMode):
    """A mode that widens the operands of products on the CPU, and rounds the result."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func not in _PRODUCTS or not _is_half(args[0]):
            return func(*args, **options)
        wide = {name: _widened(value) for name, value in options.items()}
        return func(*map(_widened, args), **wide).to(args[0].dtype)


def _is_half(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cpu and value.dtype in _HALF


def _widened(value: Any) -> Any:
    return value.float() if _is_half(value) else value
