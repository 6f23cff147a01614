"""Measurements of one device, and what follows for a whole step, without a GPU or torch.

The models read `qoq_tune.json`, which anybody may have written; what they accept is complete.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

# Times are bounded, so that no sum or product of them overflows.
Seconds = Annotated[float, Field(gt=0, lt=1e6)]

PREFILL_TOKENS = (512, 1024, 2048, 4096, 8192)


def decode_batches(max_batch: int) -> tuple[int, ...]:
    """List the batch sizes to measure: powers of two, from 16 on also the middle between two."""
    sizes = {max_batch}
    power = 1
    while power < max_batch:
        sizes.add(power)
        if power >= 16:
            sizes.add(power * 3 // 2)
        power *= 2
    return tuple(sorted(size for size in sizes if size <= max_batch))


@dataclass(frozen=True)
class Estimates:
    """Estimated seconds of steps, by batch size or number of tokens, and set."""

    decode: Mapping[int, Mapping[str, float]]
    prefill: Mapping[int, Mapping[str, float]]

    def prefill_per_token(self) -> dict[str, float]:
        """Compute the seconds of a token in each set, the mean over the sizes."""
        sets = next(iter(self.prefill.values()))
        return {
            name: math.fsum(row[name] / tokens for tokens, row in self.prefill.items())
            / len(self.prefill)
            for name in sets
        }


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Key(_Model):
    """The key of measurements, which are of use again where all of it is equal.

    checkpoint  digest of config.json without the routing, so of sets and sizes of layers
    """

    device: str
    tensor_parallel_size: PositiveInt
    vllm_qoq: str
    vllm: str
    checkpoint: str


class LayerTimes(_Model):
    """The times of the linear layers of one shape.

    layer      the name of the first of them in vLLM
    count      how many of them a step computes
    seconds    seconds of one of them, by set and number of tokens
    """

    layer: str
    out_features: PositiveInt
    in_features: PositiveInt
    count: Annotated[int, Field(gt=0, lt=10**6)]
    seconds: dict[str, dict[PositiveInt, Seconds]]


class Measurements(_Model):
    """The measurements of one run over all sets.

    decode        the batch sizes of decode steps, ascending
    prefill       the numbers of tokens of prefill steps, ascending
    head_seconds  seconds of the lm_head by batch size, equal for all sets; empty if there is none
    """

    key: Key
    sets: tuple[str, ...] = Field(min_length=1)
    decode: tuple[PositiveInt, ...] = Field(min_length=1)
    prefill: tuple[PositiveInt, ...] = Field(min_length=1)
    shapes: tuple[LayerTimes, ...] = Field(min_length=1)
    head_seconds: dict[PositiveInt, Seconds]

    @model_validator(mode="after")
    def _complete(self) -> Measurements:
        tokens = {*self.decode, *self.prefill}
        for sizes in (self.decode, self.prefill):
            if list(sizes) != sorted(set(sizes)):
                raise ValueError(f"the sizes {list(sizes)} do not ascend")
        for shape in self.shapes:
            if set(shape.seconds) != set(self.sets):
                raise ValueError(f"{shape.layer} was not measured in every set")
            for name, seconds in shape.seconds.items():
                if set(seconds) != tokens:
                    raise ValueError(f"{shape.layer} in {name} was not measured at every size")
        if self.head_seconds and not set(self.decode) <= set(self.head_seconds):
            raise ValueError("the lm_head was not measured at every batch size")
        return self

    def at(self, decode: tuple[int, ...]) -> Measurements:
        """Copy them with only the batch sizes `decode`, which are among its own."""
        tokens = {*decode, *self.prefill}
        shapes = tuple(
            shape.model_copy(update={"seconds": _only(shape.seconds, tokens)})
            for shape in self.shapes
        )
        return self.model_copy(update={"decode": decode, "shapes": shapes})

    def estimates(self) -> Estimates:
        """Estimate what the linear layers take in a step, in decode with the lm_head.

        Attention, norms and sampling are left out. They are equal for all sets, so whole steps
        differ by less, relatively.
        """
        return Estimates(
            decode={
                batch: {
                    name: self._linear(name, batch) + self.head_seconds.get(batch, 0.0)
                    for name in self.sets
                }
                for batch in self.decode
            },
            prefill={
                tokens: {name: self._linear(name, tokens) for name in self.sets}
                for tokens in self.prefill
            },
        )

    def _linear(self, name: str, tokens: int) -> float:
        return math.fsum(shape.count * shape.seconds[name][tokens] for shape in self.shapes)


class StepCheck(_Model):
    """Measurements of whole decode steps with a routing and with each set alone.

    routing       the routing as in config.json
    step_seconds  batch size -> set -> seconds of the model's forward pass
    routed        batch size -> seconds with the routing
    """

    routing: dict[str, Any]
    step_seconds: dict[PositiveInt, dict[str, Seconds]]
    routed: dict[PositiveInt, Seconds]

    @model_validator(mode="after")
    def _complete(self) -> StepCheck:
        if set(self.step_seconds) != set(self.routed) or not all(self.step_seconds.values()):
            raise ValueError("the routing and the sets were checked at different batch sizes")
        return self

    def slowdown(self, batch: int) -> float:
        """Compare the routing with the best single set; 0.1 is ten percent slower."""
        return self.routed[batch] / min(self.step_seconds[batch].values()) - 1


def _only(
    seconds: Mapping[str, Mapping[int, float]], tokens: set[int]
) -> dict[str, dict[int, float]]:
    return {name: {m: s for m, s in row.items() if m in tokens} for name, row in seconds.items()}
