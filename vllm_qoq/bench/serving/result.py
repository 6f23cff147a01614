"""The result of `bench serving`, and what follows from it, without a GPU, torch or vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_qoq.bench.serving.cases import Lengths
from vllm_qoq.bench.serving.floor import Limits, Model, step_seconds, tokens_per_second
from vllm_qoq.bench.serving.formats import Format
from vllm_qoq.bench.serving.records import Facts, Measured
from vllm_qoq.errors import FormatError

_SPREADS = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def is_on_one_card(engine_args: Mapping[str, Any]) -> bool:
    """Whether arguments of `LLM()` leave an engine on one card."""
    return all(engine_args.get(name, 1) in (1, None) for name in _SPREADS)


@dataclass(frozen=True)
class Engine:
    """What was measured of a format or a checkpoint.

    format       None for a checkpoint
    facts        None where the engine did not start
    weights_gib  GiB that loading the weights took, by vLLM's log; None where it does not say
    left_out     why cases are missing; None where none are
    too_large    which batches its KV cache does not hold; None where it holds all
    """

    name: str
    is_ours: bool
    format: Format | None
    facts: Facts | None
    weights_gib: float | None
    measured: tuple[Measured, ...]
    left_out: str | None = None
    too_large: str | None = None

    def at(self, lengths: Lengths) -> dict[int, Measured]:
        """Map each batch that was measured with these lengths to its result, in ascending order."""
        found = {one.batch: one for one in self.measured if one.case[0] == lengths}
        return dict(sorted(found.items()))

    def best(self, lengths: Lengths) -> Measured | None:
        """Find the run with the highest throughput; None where there is none."""
        return max(self.at(lengths).values(), key=lambda one: one.tokens_per_second, default=None)


@dataclass(frozen=True)
class Result:
    """The result of one run.

    model        name of a shape or folder; None where only checkpoints were measured
    config       the model's `config.json`
    device       name of the card
    limits       of the card; None without a GPU
    environment  the result of `vllm_qoq.environment.describe`
    most         the largest batch that "full" could be
    repeats      runs of each case
    engine_args  what the user gave for all engines
    """

    model: str | None
    config: Mapping[str, Any] | None
    device: str
    limits: Limits | None
    environment: Mapping[str, Any]
    lengths: tuple[Lengths, ...]
    batches: tuple[str, ...]
    most: int
    repeats: int
    engine_args: Mapping[str, Any]
    engines: tuple[Engine, ...]

    @property
    def is_on_one_card(self) -> bool:
        """Whether no engine is spread over several cards."""
        return is_on_one_card(self.engine_args)

    def best_peer(self, lengths: Lengths) -> Engine | None:
        """Find the engine of vLLM's own formats with the highest throughput."""
        return self._best(lengths, is_ours=False)

    def best_of_ours(self, lengths: Lengths) -> Engine | None:
        """Find our engine with the highest throughput."""
        return self._best(lengths, is_ours=True)

    def _best(self, lengths: Lengths, is_ours: bool) -> Engine | None:
        found = {
            engine.name: best.tokens_per_second
            for engine in self.engines
            if engine.is_ours == is_ours and (best := engine.best(lengths))
        }
        name = max(found, key=found.__getitem__, default=None)
        return next((engine for engine in self.engines if engine.name == name), None)

    def speedup(self, lengths: Lengths) -> float | None:
        """Divide the highest throughput of ours by the highest of vLLM's own formats."""
        ours, peer = self.best_of_ours(lengths), self.best_peer(lengths)
        best, other = ours and ours.best(lengths), peer and peer.best(lengths)
        return best.tokens_per_second / other.tokens_per_second if best and other else None

    def share_of_floor(self, engine: Engine, one: Measured) -> float | None:
        """Compare a throughput with the floor's: 1 is as fast as this card can be."""
        if (found := self._floor(engine)) is None:
            return None
        lengths, batch = one.case
        return one.tokens_per_second / tokens_per_second(*found, lengths, batch)

    def share_of_step_floor(self, engine: Engine, one: Measured) -> float | None:
        """Compare a decode step with the floor's."""
        if one.step_seconds is None or (found := self._floor(engine)) is None:
            return None
        floor = step_seconds(*found, one.batch, one.prompt + one.new / 2)
        return floor / one.step_seconds

    def cache_gib(self, engine: Engine, one: Measured) -> float | None:
        """Compute the GiB of the KV cache of a batch at its end."""
        if engine.format is None or (model := self._model) is None:
            return None
        tokens = one.batch * (one.prompt + one.new)
        return tokens * model.cache_bytes(engine.format.cache) / 2**30

    @cached_property
    def _model(self) -> Model | None:
        """Read the sizes of the model; None where they are not known."""
        try:
            return None if self.config is None else Model.of(self.config)
        except FormatError:
            return None

    def _floor(self, engine: Engine) -> tuple[Model, Format, Limits] | None:
        """Find what a floor follows from; None where some of it is unknown."""
        how, model = engine.format, self._model
        if how is None or model is None or self.limits is None or not self.is_on_one_card:
            return None
        needed = {how.weights.inputs, "bf16", *({"int8"} if how.weights.head_bits == 8 else ())}
        if needed - set(self.limits.operations):
            return None
        return model, how, self.limits


def to_json(result: Result) -> dict[str, Any]:
    """Make the document of --json and serving.json; null for what is not known."""
    limits = result.limits
    return {
        "benchmark": "serving",
        "model": result.model,
        "device": result.device,
        "environment": dict(result.environment),
        "copy_bytes_per_second": limits and limits.copy_rate,
        "operations_per_second": limits and dict(limits.operations),
        "lengths": [str(one) for one in result.lengths],
        "batches": list(result.batches),
        "max_batch": result.most,
        "repeats": result.repeats,
        "engine_args": dict(result.engine_args),
        "engines": [_engine(result, engine) for engine in result.engines],
        "speed_against_the_best_peer": {str(one): result.speedup(one) for one in result.lengths},
    }


def _engine(result: Result, engine: Engine) -> dict[str, Any]:
    facts = engine.facts
    return {
        "name": engine.name,
        "is_ours": engine.is_ours,
        "weights_gib": engine.weights_gib,
        "pool_tokens": facts and facts.pool_tokens,
        "start_seconds": facts and facts.start_seconds,
        "left_out": engine.left_out,
        "too_large": engine.too_large,
        "cases": [
            {
                **one.model_dump(),
                "tokens_per_second": one.tokens_per_second,
                "share_of_floor": result.share_of_floor(engine, one),
                "share_of_step_floor": result.share_of_step_floor(engine, one),
                "cache_gib": result.cache_gib(engine, one),
            }
            for one in sorted(engine.measured, key=lambda one: one.case)
        ],
    }
