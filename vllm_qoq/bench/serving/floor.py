"""The floor of serving: the time that a card needs for the bytes and operations alone.

A decode step reads the linear layers and the lm_head once, for all sequences, and the cache of each
sequence; it multiplies every weight once for each sequence. A prompt multiplies every weight of the
linear layers once for each of its tokens, and its tokens with those before them. Each part takes
its bytes at the speed of a copy or its operations at the measured rate of their type, whichever is
longer. Norms, RoPE, sampling and the embedding count as nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_qoq.bench.serving.cases import Lengths
from vllm_qoq.bench.serving.formats import CACHES, OUR_CACHES, SCALES_BYTES, Format
from vllm_qoq.models.linears import linear_layers
from vllm_qoq.models.table import architecture_of, with_experts, with_names


class Limits(NamedTuple):
    """The measured limits of a card.

    copy_rate   bytes a second of a copy, read plus written
    operations  operations a second of the tensor cores, by the type of the inputs
    """

    copy_rate: float
    operations: Mapping[str, float]


@dataclass(frozen=True)
class Model:
    """The sizes of a model that its floor depends on.

    weights        weights of the linear layers
    head_weights   weights of the lm_head
    layers         layers with attention
    """

    weights: int
    head_weights: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Model:
        """Read a model's `config.json`; FormatError for one that is not in the table of models."""
        # A step reads the experts that its tokens choose, so the floor would depend on the text.
        dense = [name for name in with_names() if name not in with_experts()]
        linears = linear_layers(config, "measured against a floor", dense).linears
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        architecture = architecture_of(config)
        defaults = architecture.defaults if architecture else {}
        return cls(
            weights=sum(math.prod(shape) for shape in linears.values()),
            head_weights=int(config["vocab_size"]) * int(config["hidden_size"]),
            layers=layers,
            heads=heads,
            kv_heads=int(
                config.get("num_key_value_heads") or defaults.get("num_key_value_heads", heads)
            ),
            head_size=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
        )

    def cache_bytes(self, cache: str) -> float:
        """Count the bytes of a token in a cache of CACHES."""
        ours = SCALES_BYTES if cache in OUR_CACHES else 0
        return self.layers * self.kv_heads * 2 * (self.head_size * CACHES[cache] / 8 + ours)


def step_seconds(model: Model, how: Format, limits: Limits, batch: int, context: float) -> float:
    """Compute the floor of a decode step of `batch` sequences of `context` tokens."""
    weights = how.weights
    head_inputs = "int8" if weights.head_bits == 8 else "bf16"
    linears = _longer(
        limits, model.weights * weights.step_bits / 8, 2 * model.weights * batch, weights.inputs
    )
    head = _longer(
        limits, model.head_weights * weights.head_bits / 8, 2 * model.head_weights * batch,
        head_inputs,
    )  # fmt: skip
    return linears + head + batch * context * model.cache_bytes(how.cache) / limits.copy_rate


def prompt_seconds(model: Model, how: Format, limits: Limits, tokens: int) -> float:
    """Compute the floor of one of many prompts of `tokens` tokens that share the weights."""
    # Two products over half of the pairs of tokens, as each sees only those before it.
    attention = 2 * 2 * tokens**2 / 2 * model.heads * model.head_size * model.layers
    return (
        2 * model.weights * tokens / limits.operations[how.weights.inputs]
        + attention / limits.operations["bf16"]
    )


def tokens_per_second(
    model: Model, how: Format, limits: Limits, lengths: Lengths, batch: int
) -> float:
    """Compute the most new tokens a second of `batch` requests that begin together."""
    context = lengths.prompt + lengths.new / 2
    prompts = batch * prompt_seconds(model, how, limits, lengths.prompt)
    steps = (lengths.new - 1) * step_seconds(model, how, limits, batch, context)
    return batch * lengths.new / (prompts + steps)


def _longer(limits: Limits, bytes_: float, operations: float, inputs: str) -> float:
    return max(bytes_ / limits.copy_rate, operations / limits.operations[inputs])
