"""The interface of an engine that `tune` measures; `vllm_engine` has vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_qoq.routing.table import Routing


@dataclass(frozen=True)
class LayerGroup:
    """The `count` layers of one shape, called `name` like `model.layers.0.self_attn.qkv_proj`."""

    name: str
    out_features: int
    in_features: int
    count: int


class Engine(Protocol):
    """A running engine with all sets of one checkpoint loaded."""

    def layers(self) -> Sequence[LayerGroup]:
        """Group the routed linear layers of the model by shape."""

    def linear_seconds(self, layers: LayerGroup, set_name: str, tokens: int) -> float:
        """Measure one of `layers` in one set, with weights from memory and not from a cache."""

    def head_seconds(self, tokens: int) -> float | None:
        """Measure the lm_head; None if the model has none that can be called."""

    def step_seconds(self, routing: Routing, batch: int) -> float | None:
        """Measure the model in a decode step of `batch` requests, without lm_head and sampling.

        The result is None if the KV cache does not hold so many.
        """
