"""Random weights for vLLM's own formats, instead of the zeros of `--load-format dummy`.

vLLM gives random values to floats alone, and such small ones that fp8 holds zeros. To multiply
zeros takes a GPU less power, and so it keeps a higher clock than with a model's weights.

Its embedding is so small beside what layers with quantized weights add to it that tokens become
alike after a few of them, and routers would send a whole prompt to the same experts. In a mixture
of experts the embedding is made larger, and so each token goes to experts of its own, the same in
all formats, and each expert gets nearly as many tokens as any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

# Of linear layers, and of the two layers that all experts of a mixture have together.
_EXPERTS = ("w13_", "w2_")
_NAMES = tuple(f"{of}{name}" for of in ("", *_EXPERTS) for name in ("weight", "weight_packed"))
_OURS = "vllm_qoq."
# Standard deviation: fp8 goes to 448, and quantized weights use the range.
_FP8_DEVIATION = 100
_ROWS = 1024  # filled at a time, since the KV cache leaves little memory
_EMBEDDING_FACTOR = 1000  # vLLM's dummies are within -0.001 and 0.001


class RandomWeights:
    """An extension of vLLM's workers (`worker_extension_cls`)."""

    get_model: Any  # the worker's

    def fill_random_weights(self) -> int:
        """Fill the quantized weights of vLLM's layers in place; returns how many there are."""
        count, model = 0, self.get_model()
        if any(_is_of_experts(name) for name, _ in model.named_parameters()):
            for embedding in _embeddings(model):
                embedding.mul_(_EMBEDDING_FACTOR)
        for weight in _weights(model):
            if weight.dtype == torch.int8:
                weight.random_(-127, 128)
            elif weight.dtype == torch.int32:  # codes of 4 bits, packed
                weight.random_(torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max)
            elif weight.dtype == torch.float8_e4m3fn:
                for rows in _rows(weight):
                    floats = torch.randn(rows.shape, dtype=torch.bfloat16, device=rows.device)
                    rows.copy_((floats * _FP8_DEVIATION).clamp(-448, 448))
            else:
                continue
            count += 1
        return count


def _is_of_experts(name: str) -> bool:
    return name.rpartition(".")[2].startswith(_EXPERTS)


def _embeddings(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            yield module.weight.data


def _rows(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    for matrix in weight if weight.ndim == 3 else (weight,):
        yield from matrix.split(_ROWS)


def _weights(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        if not any(_is_ours(one) for one in (module, getattr(module, "quant_method", None))):
            for name in _NAMES:
                weight = getattr(module, name, None)
                if isinstance(weight, torch.Tensor):
                    yield weight.data


def _is_ours(one: object) -> bool:
    return type(one).__module__.startswith(_OURS)
