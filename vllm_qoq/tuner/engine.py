"""What `tune` asks of a running engine; vLLM's is in `vllm_engine`, which imports vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_qoq.routing.table import Routing


@dataclass(frozen=True)
class LayerGroup:
    """All layers of one shape: `count` of them, called `name` like `qkv_proj`."""

    name: str
    out_features: int
    in_features: int
    count: int


class Engine(Protocol):
    """All sets of one checkpoint, loaded."""

    def layers(self) -> Sequence[LayerGroup]:
        """Every routed linear layer of the model, by shape."""

    def linear_seconds(self, layers: LayerGroup, set_name: str, tokens: int) -> float:
        """Of one of `layers` in one set, whose weights come from memory and not from a cache."""

    def head_seconds(self, tokens: int) -> float | None:
        """Of the lm_head; None if the model has none that can be called."""

    def step_seconds(self, routing: Routing, batch: int) -> float | None:
        """Of the model in a decode step of `batch` requests, without lm_head and sampling.

        None if the KV cache does not hold so many.
        """
