"""The portable path of the W4A8 GEMM on any GPU, as if it were a smaller one.

The library has an implementation of `qoq::w4a8_gemm_portable`, which exists for the tests alone:
the package gives it no schema, so that nobody else can call it. Importing this module does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.library import Library

_SCHEMA = (
    "(Tensor x, Tensor x_scale, Tensor x_row_sum, Tensor weight, Tensor channel_scale, "
    "Tensor? channel_zero, Tensor? group_scale, Tensor? group_offset, Tensor? bias, "
    "ScalarType out_dtype, Tensor? workspace, Tensor? residual, Tensor? use_residual, "
    "int shared_bytes, int multiprocessors) -> Tensor"
)
_library = Library("qoq", "FRAGMENT")
_library.define("w4a8_gemm_portable" + _SCHEMA)


class Size(NamedTuple):
    """What a GPU has at most: shared memory of a block in bytes, and multiprocessors."""

    shared_bytes: int
    multiprocessors: int


# A small one, and those of which csrc/gemm/portable/ has costs; 1 << 30 is what there is.
SIZES = {
    "20 SMs": Size(99 << 10, 20),
    "A10": Size(99 << 10, 72),
    "A100": Size(163 << 10, 108),
    "4090": Size(99 << 10, 128),
    "all": Size(1 << 30, 1 << 30),
}


def w4a8_gemm_portable(*arguments: object, size: Size = SIZES["all"]) -> torch.Tensor:
    """Compute `w4a8_gemm` of 13 arguments by the portable path on a GPU of at most this size."""
    return torch.ops.qoq.w4a8_gemm_portable(*arguments, *size)
