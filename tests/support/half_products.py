"""Matrix products of bf16 and fp16 on processors that have no instructions for them.

There PyTorch takes five times as long for them as for float32 ones, and quantizing a model, its
perplexity and most engines are little else. Computed in float32 and rounded once, the elements
are the same but for the order of the sums.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

_HALF = (torch.bfloat16, torch.float16)
_library = torch.library.Library("aten", "IMPL")


def hasten() -> None:
    """Compute these products in float32, in this process and its forks, where that is faster."""
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for name in ("mm", "addmm", "bmm"):
            _override(name)


def _override(name: str) -> None:
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

    def product(keys: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        dtype = arguments[0].dtype
        if dtype not in _HALF:
            return kernel.call_boxed(keys, *arguments, **options)
        return kernel.call_boxed(keys, *(a.float() for a in arguments), **options).to(dtype)

    _library.impl(name, product, "CPU", with_keyset=True)
