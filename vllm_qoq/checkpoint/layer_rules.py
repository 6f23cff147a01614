"""Checks that the layer rules of a routing table match layers of the checkpoint.

A rule that matches nothing is a typo that would change nothing and say nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vllm_qoq.errors import shown
from vllm_qoq.models.names import FUSED
from vllm_qoq.routing.table import Routing, RoutingError

# vLLM runs these projections as one layer, whose name a rule may use.
_FUSED = {parts[0]: fused for fused, parts in FUSED.items()}


def unmatched(routing: Routing, quantized: Iterable[str]) -> list[str]:
    """The globs that match none of the layers `quantized`, nor a name of vLLM's for them."""
    layers = sorted(quantized)
    return routing.unmatched([*layers, *_fused(layers)])


def check(routing: Routing, quantized: Iterable[str]) -> None:
    """Raise RoutingError for the first glob of `unmatched`."""
    layers = sorted(quantized)
    for glob in unmatched(routing, layers):
        example = f"; a layer is called {layers[0]}" if layers else ""
        raise RoutingError(f"layer rule {shown(glob)} matches no quantized layer{example}")


def _fused(layers: Iterable[str]) -> Iterator[str]:
    for layer in layers:
        parent, _, leaf = layer.rpartition(".")
        if leaf in _FUSED:
            yield f"{parent}.{_FUSED[leaf]}"
