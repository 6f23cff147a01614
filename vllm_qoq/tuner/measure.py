"""Measuring all layers of all sets over all numbers of tokens, and whole steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_qoq.progress import counted
from vllm_qoq.routing.table import Phase, Routing, Step
from vllm_qoq.tuner.engine import Engine, LayerGroup
from vllm_qoq.tuner.measurements import Key, LayerTimes, Measurements, StepCheck

_CHECKED_BATCHES = 3
# A routing that is slower than its best single set by more than this is not what was promised.
# Whatever else runs on the machine only adds time, so it is measured again before it is reported.
SUSPICIOUS = 0.10
_ROUNDS = 3


def measure(
    engine: Engine,
    key: Key,
    sets: Sequence[str],
    decode: Sequence[int],
    prefill: Sequence[int],
    quiet: bool,
) -> Measurements:
    """Measure the sets one right after the other at each size, so that a drift hits all of them."""
    layers = engine.layers()
    tokens = sorted({*decode, *prefill})
    with counted("measure", len(layers) * len(tokens), quiet) as advance:
        shapes = tuple(_shape(engine, one, sets, tokens, advance=advance) for one in layers)
    heads = {batch: engine.head_seconds(batch) for batch in decode}
    return Measurements(
        key=key,
        sets=tuple(sets),
        decode=tuple(decode),
        prefill=tuple(prefill),
        shapes=shapes,
        head_seconds={batch: seconds for batch, seconds in heads.items() if seconds is not None},
    )


def check(
    engine: Engine, routing: Routing, sets: Sequence[str], decode: Sequence[int], quiet: bool
) -> StepCheck:
    """Measure whole steps with the routing and with each set alone, at the `checked_batches`."""
    batches = checked_batches(routing, decode)
    step_seconds, routed = {}, {}
    with counted("check", len(batches) * (1 + len(sets)), quiet) as advance:
        for batch in batches:
            times = _steps(engine, routing, sets, batch, advance=advance)
            for _ in range(_ROUNDS - 1):
                if times is None or times[None] <= min(times.values()) * (1 + SUSPICIOUS):
                    break
                again = _steps(engine, routing, sets, batch)
                if again is not None:
                    times = {name: min(seconds, again[name]) for name, seconds in times.items()}
            if times is not None:
                routed[batch] = times.pop(None)
                step_seconds[batch] = times
    return StepCheck.model_validate(
        {"routing": routing.to_json(), "step_seconds": step_seconds, "routed": routed}
    )


def _steps(
    engine: Engine,
    routing: Routing,
    sets: Sequence[str],
    batch: int,
    advance: Callable[[], object] = lambda: None,
) -> dict[str | None, float] | None:
    """Measure the seconds of a whole step with the routing (under None) and with each set alone.

    The result is None where the KV cache is too small for the batch.
    """
    times: dict[str | None, float] = {}
    is_whole = True
    for name in (None, *sets):
        used = routing if name is None else Routing.forced(name)
        seconds = engine.step_seconds(used, batch)
        advance()
        if seconds is None:
            is_whole = False
        else:
            times[name] = seconds
    return times if is_whole else None


def checked_batches(routing: Routing, decode: Sequence[int]) -> list[int]:
    """The last measured batch of the first, a middle and the last row of `routing`.

    These are up to three batch sizes. A single row has its first and its last.
    """
    route = routing.route([])
    rows = [route.choose(Step(Phase.DECODE, batch)) for batch in decode]
    ends = [
        batch
        for batch, name, following in zip(decode, rows, [*rows[1:], None], strict=True)
        if name != following
    ]
    if len(ends) == 1:
        return sorted({decode[0], decode[-1]})
    if len(ends) <= _CHECKED_BATCHES:
        return ends
    return [ends[0], ends[len(ends) // 2], ends[-1]]


def _shape(
    engine: Engine,
    layers: LayerGroup,
    sets: Sequence[str],
    tokens: Sequence[int],
    advance: Callable[[], object],
) -> LayerTimes:
    seconds: dict[str, dict[int, float]] = {name: {} for name in sets}
    for m in tokens:
        for name in sets:
            seconds[name][m] = engine.linear_seconds(layers, name, m)
        advance()
    return LayerTimes(
        layer=layers.name,
        out_features=layers.out_features,
        in_features=layers.in_features,
        count=layers.count,
        seconds=seconds,
    )
