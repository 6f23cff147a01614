"""The floor of serving: the time that a card needs for the bytes and operations alone.

A decode step reads the linear layers and the lm_head once, for all sequences, and the cache of each
sequence; it multiplies every weight once for each sequence. A prompt multiplies every weight of the
linear layers once for each of its tokens, and its tokens with those before them. Of a mixture of
experts each token is multiplied with its own, and a step reads those that any of its tokens has:
as many as there are on average if a router chooses each expert as often as any other. Each part
takes its bytes at the speed of a copy or its operations at the measured rate of their type,
whichever is longer. Norms, RoPE, sampling and the embedding count as nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_qoq.bench.serving.cases import Lengths
from vllm_qoq.bench.serving.formats import CACHES, OUR_CACHES, SCALES_BYTES, Format
from vllm_qoq.models.linears import linear_layers
from vllm_qoq.models.table import ARCHITECTURES, LINEAR, architecture_of
from vllm_qoq.models.tensors import expected_tensors


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

    weights        weights of the linear layers that all tokens go through
    experts        weights of all experts of all layers
    share          share of the experts of a layer that a token goes through
    routers        weights in float that say where: of routers and the gates of shared experts, and
                   what the state of linear attention keeps
    head_weights   weights of the lm_head
    layers         layers with attention to all tokens
    """

    weights: int
    experts: int
    share: float
    routers: int
    head_weights: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Model:
        """Read a model's `config.json`; FormatError for one that is not in the table of models."""
        linears = linear_layers(config, "measured against a floor", ARCHITECTURES).linears
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        kinds = expected_tensors(config).kinds
        architecture = architecture_of(config)
        assert architecture is not None
        defaults, mixture = architecture.defaults, architecture.experts
        count, share = {"weights": 0, "experts": 0, "routers": 0}, 0.0
        linear = architecture.names.linear if architecture.names is not None else None
        narrow = tuple(f".{name}" for name in linear.floats) if linear is not None else ()
        for name, shape in linears.items():
            kind = "weights"
            if mixture is not None and f".{mixture.prefix}." in name:
                kind = "experts"
            elif mixture is not None and name.endswith(f".{mixture.router}"):
                kind, share = "routers", expected_tensors(config).experts_of_token / shape[0]
            elif shape[0] == 1 or name.endswith(narrow):  # the gate of a shared expert
                kind = "routers"
            count[kind] += math.prod(shape)
        return cls(
            **count,
            share=share,
            head_weights=int(config["vocab_size"]) * int(config["hidden_size"]),
            layers=layers - kinds.count(LINEAR),
            heads=heads,
            kv_heads=int(
                config.get("num_key_value_heads") or defaults.get("num_key_value_heads", heads)
            ),
            head_size=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
        )

    def experts_read(self, tokens: int) -> float:
        """Count the weights of the experts that any of `tokens` tokens goes through, on average."""
        return self.experts * (1 - (1 - self.share) ** tokens)

    @property
    def weights_of_a_token(self) -> float:
        """Count the weights of the linear layers that a token is multiplied with."""
        return self.weights + self.experts * self.share

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
    experts = _longer(
        limits,
        model.experts_read(batch) * weights.step_bits / 8,
        2 * model.experts * model.share * batch,
        weights.inputs,
    )
    routers = _longer(limits, 2 * model.routers, 2 * model.routers * batch, "bf16")
    head = _longer(
        limits, model.head_weights * weights.head_bits / 8, 2 * model.head_weights * batch,
        head_inputs,
    )  # fmt: skip
    cache = batch * context * model.cache_bytes(how.cache) / limits.copy_rate
    return linears + experts + routers + head + cache


def prompt_seconds(model: Model, how: Format, limits: Limits, tokens: int) -> float:
    """Compute the floor of one of many prompts of `tokens` tokens that share the weights."""
    # Two products over half of the pairs of tokens, as each sees only those before it.
    attention = 2 * 2 * tokens**2 / 2 * model.heads * model.head_size * model.layers
    return (
        2 * model.weights_of_a_token * tokens / limits.operations[how.weights.inputs]
        + (2 * model.routers * tokens + attention) / limits.operations["bf16"]
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
