"""The attention of the passes over the calibration text on a CPU: one operation for all of it.

llmcompressor runs a model with "eager" attention, which writes every score several times. The fused
operation of PyTorch writes none of them, and leaves out those that the causal mask hides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from vllm_qoq.quantizer.model import Module

_EAGER = "eager"


@contextmanager
def fused_attention() -> Iterator[None]:
    """A context in which "eager" attention of transformers is fused, if this is a CPU's run.

    A GPU's stays as it is.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if torch.cuda.is_available():
        yield
        return
    # Each attention module asks here first, and takes its own function where there is none.
    ALL_ATTENTION_FUNCTIONS[_EAGER] = _attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_EAGER]


def _attention(
    module: Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend to a whole piece of text: query [1, Hq, T, D], key and value [1, H, T, D].

    attention_mask  float [1, 1, T, T], what is added to the scores: minus infinity for keys that
                    come later, or earlier than the window
    """
    if softcap is not None:
        return capped(query, key, value, attention_mask, scaling, softcap), None
    # Without a window the mask is the causal one, because pieces have no padding.
    is_causal = sliding_window is None or sliding_window >= key.shape[2]
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if is_causal else attention_mask,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=True,
    )
    return output.transpose(1, 2).contiguous(), None


def capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """Attend with scores that `softcap * tanh(score / softcap)` bounds, as Gemma 2 does.

    query    float [1, Hq, T, D]
    key      float [1, H, T, D], as `value`
    mask     what is added to the scores, or bool, whether a key is seen; None is a causal one

    Returns float [1, T, Hq, D].
    """
    tokens, heads = query.shape[2], key.shape[1]
    if mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    grouped = query.unflatten(1, (heads, -1))
    scores = torch.matmul(grouped, key[:, :, None].transpose(-1, -2)).float() * scaling
    scores = softcap * torch.tanh(scores / softcap)
    mask = mask.unsqueeze(-3) if mask.ndim > 2 else mask
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(dim=-1).to(query.dtype)
    output = torch.matmul(weights, value[:, :, None]).flatten(1, 2)
    return output.transpose(1, 2).contiguous()
