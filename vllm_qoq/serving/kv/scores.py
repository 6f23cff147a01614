"""What an attention layer does to its scores: vLLM's own implementation of the layer knows it."""

from __future__ import annotations

from typing import Any

import torch


def soft_cap_of(layer: Any) -> float:
    """Look up where the scores of an attention layer are capped, 0 where they are not."""
    return float(getattr(layer.impl, "logits_soft_cap", None) or 0)


def sinks_of(layer: Any) -> torch.Tensor | None:
    """Look up the sinks [Hq] of an attention layer, which weights fill later; None without any."""
    sinks: torch.Tensor | None = layer.impl.sinks if layer.has_sink else None
    return sinks
