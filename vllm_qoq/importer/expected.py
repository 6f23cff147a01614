"""Which tensors the base model has, from its `config.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_tools.architectures import ARCHITECTURES, architecture
from merge_tools.expected import EMBEDDING as EMBEDDING
from merge_tools.expected import HEAD as HEAD
from merge_tools.expected import LAYERS, expected_tensors
from vllm_qoq.checkpoint import CONFIG
from vllm_qoq.errors import shown
from vllm_qoq.format import FormatError, split_layer

# Older versions of transformers save this constant, which the model computes, with the weights.
CONSTANT = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class Expected:
    """The decoder of the base model.

    linears   layer -> (out_features N, in_features K)
    biased    the linear layers that have a bias
    others    tensor -> shape: embedding, norms, lm_head
    is_tied   whether lm_head may be absent because the embedding serves as one
    """

    linears: Mapping[str, tuple[int, int]]
    biased: frozenset[str]
    others: Mapping[str, tuple[int, ...]]
    is_tied: bool


def expected(config: Mapping[str, Any], task: str = "imported") -> Expected:
    """What a checkpoint of the model that `config` describes must hold.

    FormatError for an architecture that cannot be `task`, and for sizes that cannot be.
    """
    if architecture(config) is None:
        raise FormatError(
            f"{CONFIG}: architectures: {shown(config.get('architectures'))} cannot be {task}; "
            f"what can is a language model, one of {', '.join(ARCHITECTURES)}"
        )
    tensors = expected_tensors(config)
    linears, biased, others = {}, set(), {}
    for name, shape in [*tensors.items(), *tensors.optional.items()]:
        layer, leaf = split_layer(name)
        if leaf == "bias":
            biased.add(layer)
        elif name.startswith(LAYERS) and len(shape) == 2:
            linears[layer] = (shape[0], shape[1])
        else:
            others[name] = shape
    return Expected(linears, frozenset(biased), others, tensors.is_tied)
