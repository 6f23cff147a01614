"""Checks that the layer rules of a routing table match layers of the checkpoint.

A rule that matches nothing is a typo that would change nothing and say nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vllm_qoq.errors import shown
from vllm_qoq.models.names import FUSED, experts_of, split_expert
from vllm_qoq.routing.table import Routing, RoutingError

# vLLM runs these projections as one layer, whose name a rule may use.
_FUSED = {parts[0]: fused for fused, parts in FUSED.items()}


def unmatched(routing: Routing, quantized: Iterable[str]) -> list[str]:
    """The globs that match none of the layers `quantized`, nor a name of vLLM's for them.

    All experts of a mixture run in one set, so it has one name, `model.layers.0.mlp.experts`.
    """
    return routing.unmatched(_routed(quantized))


def check(routing: Routing, quantized: Iterable[str]) -> None:
    """Raise RoutingError for the first glob of `unmatched`."""
    layers = _routed(quantized)
    for glob in routing.unmatched(layers):
        example = f"; a layer is called {layers[0]}" if layers else ""
        raise RoutingError(f"layer rule {shown(glob)} matches no quantized layer{example}")


def _routed(quantized: Iterable[str]) -> list[str]:
    """List the layers that a rule may name."""
    layers = sorted(quantized)
    alone = [layer for layer in layers if split_expert(layer) is None]
    return [*alone, *_fused(alone), *sorted(experts_of(layers))]


def _fused(layers: Iterable[str]) -> Iterator[str]:
    for layer in layers:
        parent, _, leaf = layer.rpartition(".")
        if leaf in _FUSED:
            yield f"{parent}.{_FUSED[leaf]}"
