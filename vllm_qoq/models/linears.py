"""The linear layers of a model, and its other tensors, from its `config.json` alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_qoq.errors import FormatError, shown
from vllm_qoq.models.config import CONFIG, architecture_name
from vllm_qoq.models.table import with_names
from vllm_qoq.models.tensors import LAYERS, expected_tensors

# Older versions of transformers save this constant, which the model computes, with the weights.
CONSTANT = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class LinearLayers:
    """The linear layers of a model, and its other tensors.

    linears   layer -> (out_features N, in_features K)
    biased    the linear layers that have a bias
    others    tensor -> shape: embedding, norms, lm_head
    is_tied   whether lm_head may be absent because the embedding serves as one
    """

    linears: Mapping[str, tuple[int, int]]
    biased: frozenset[str]
    others: Mapping[str, tuple[int, ...]]
    is_tied: bool


def linear_layers(
    config: Mapping[str, Any], task: str, among: Collection[str] = tuple(with_names())
) -> LinearLayers:
    """List what a checkpoint of the model that `config` describes must hold.

    task   what is to be done to the model, "quantized": a participle for the message
    among  the architectures to which that can be done

    Raises FormatError for an architecture that cannot be `task`, and for impossible sizes.
    """
    if architecture_name(config) not in among:
        raise FormatError(
            f"{CONFIG}: architectures: {shown(config.get('architectures'))} cannot be {task}; "
            f"what can is a language model, one of {', '.join(among)}"
        )
    tensors = expected_tensors(config)
    linears, biased, others = {}, set(), {}
    for name, shape in [*tensors.items(), *tensors.optional.items()]:
        layer, _, leaf = name.rpartition(".")
        if leaf == "bias":
            biased.add(layer)
        elif name.startswith(LAYERS) and len(shape) == 2:
            linears[layer] = (shape[0], shape[1])
        else:
            others[name] = shape
    return LinearLayers(linears, frozenset(biased), others, tensors.is_tied)
