"""Random weights for vLLM's own formats, instead of the zeros of `--load-format dummy`.

vLLM gives random values to floats alone, and such small ones that fp8 holds zeros. To multiply
zeros takes a GPU less power, and so it keeps a higher clock than with a model's weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

# Of linear layers, and of the two layers that all experts have together.
_NAMES = tuple(f"{of}{name}" for of in ("", "w13_", "w2_") for name in ("weight", "weight_packed"))
_OURS = "vllm_qoq."
# Standard deviation: fp8 goes to 448, and quantized weights use the range.
_FP8_DEVIATION = 100
_ROWS = 1024  # filled at a time, since the KV cache leaves little memory


class RandomWeights:
    """An extension of vLLM's workers (`worker_extension_cls`)."""

    get_model: Any  # the worker's

    def fill_random_weights(self) -> int:
        """Fill the quantized weights of vLLM's layers in place; returns how many there are."""
        count = 0
        for weight in _weights(self.get_model()):
            if weight.dtype == torch.int8:
                weight.random_(-127, 128)
            elif weight.dtype == torch.int32:  # codes of 4 bits, packed
                weight.random_(torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max)
            elif weight.dtype == torch.float8_e4m3fn:
                for rows in weight.split(_ROWS):
                    floats = torch.randn(rows.shape, dtype=torch.bfloat16, device=rows.device)
                    rows.copy_((floats * _FP8_DEVIATION).clamp(-448, 448))
            else:
                continue
            count += 1
        return count


def _weights(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        if not type(getattr(module, "quant_method", None)).__module__.startswith(_OURS):
            for name in _NAMES:
                weight = getattr(module, name, None)
                if isinstance(weight, torch.Tensor):
                    yield weight.data
