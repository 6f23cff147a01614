"""The refusals of the CPU ops, in the words of csrc/common/checks.h: one contract for both.

The kernels raise RuntimeError, these checks ValueError; tests/support/op_refusals.py has a case
for each.
"""

from __future__ import annotations

import torch

# The kernels read 16 bytes at a time.
ALIGNMENT = 16
HALVES = (torch.bfloat16, torch.float16)
MAX_COLUMNS = 1 << 24


def type_text(dtype: torch.dtype) -> str:
    """Name `dtype` as PyTorch's C++ side does: float32 is Float."""
    return torch.empty(0, dtype=dtype).type().rpartition(".")[2].removesuffix("Tensor")


def tensor_text(tensor: torch.Tensor) -> str:
    """Describe a tensor by its type and shape: `Float [3, 4]`."""
    return f"{type_text(tensor.dtype)} {list(tensor.shape)}"


def check_tensor(
    op: str,
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    *shape: int,
    alignment: int = ALIGNMENT,
) -> None:
    """Raise ValueError unless `tensor` is contiguous, aligned, and of this dtype and shape.

    alignment  in bytes: the address at which the tensor begins is a multiple of it
    """
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        gaps = "" if tensor.is_contiguous() else " (not contiguous)"
        raise ValueError(
            f"{op}: {name} is {tensor_text(tensor)}{gaps}, "
            f"expected {type_text(dtype)} {list(shape)}"
        )
    if tensor.numel() and tensor.data_ptr() % alignment:
        raise ValueError(
            f"{op}: {name} does not begin at a multiple of {alignment} bytes; clone it"
        )


def check_rows(op: str, x: torch.Tensor, *dtypes: torch.dtype) -> None:
    """Raise ValueError unless x is [M, K] of one of `dtypes`, and each of its rows contiguous."""
    if x.ndim != 2:
        raise ValueError(f"{op}: x is {list(x.shape)}, expected floats [M, K]")
    m, k = x.shape
    if not 0 < k <= MAX_COLUMNS or m >= 1 << 31:
        raise ValueError(f"{op}: x is {list(x.shape)}, expected 1 to 2^24 columns")
    if m and x.stride(1) != 1:
        raise ValueError(f"{op}: the columns of x are not contiguous")
    if x.dtype not in dtypes:
        *most, last = map(type_text, dtypes)
        raise ValueError(f"{op}: x is {type_text(x.dtype)}, expected {', '.join(most)} or {last}")
