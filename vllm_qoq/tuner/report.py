"""The report of a tuning, as Markdown that is readable in a terminal, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm_qoq.errors import printable
from vllm_qoq.markdown import markdown_table
from vllm_qoq.routing.table import DecodeRow, Phase, Step
from vllm_qoq.tuner.choose import fastest
from vllm_qoq.tuner.job import Outcome
from vllm_qoq.tuner.preferences import SLOWER


def markdown(outcome: Outcome) -> str:
    """Write the whole of tune.md."""
    return "\n".join(
        (
            *_head(outcome),
            *_decode(outcome),
            *_prefill(outcome),
            *_check(outcome),
            *_routing(outcome),
        )
    )


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Make the document of --json and tune.json; layers in microseconds, else milliseconds."""
    measured, estimates = outcome.measured, outcome.measured.estimates()
    return {
        "checkpoint": str(outcome.folder),
        **measured.key.model_dump(),
        "is_remembered": outcome.is_remembered,
        "prefer": outcome.request.prefer,
        "accuracy_order": list(outcome.order),
        "decode_milliseconds": _milliseconds(estimates.decode),
        "prefill_milliseconds": _milliseconds(estimates.prefill),
        "lm_head_milliseconds": {m: 1e3 * s for m, s in measured.head_seconds.items()},
        "layers": [
            {
                **shape.model_dump(exclude={"seconds"}),
                "microseconds": {
                    name: {m: 1e6 * s for m, s in seconds.items()}
                    for name, seconds in shape.seconds.items()
                },
            }
            for shape in measured.shapes
        ],
        "fastest": [
            row.model_dump(by_alias=True, exclude_none=True)
            for row in fastest(estimates, outcome.order)
        ],
        "previous_routing": outcome.before.to_json(),
        "routing": outcome.routing.to_json(),
        "check": _check_json(outcome),
        "notes": list(outcome.notes),
        "is_written": not outcome.request.dry_run,
    }


def crossings(rows: Sequence[DecodeRow], decode: Sequence[int]) -> str:
    """Put decode rows into words at the measured sizes: `w4a16 up to 16, w8a8 from 24`."""
    bounds = [row.max_batch for row in rows if row.max_batch is not None]
    starts = [None, *(decode[decode.index(bound) + 1] for bound in bounds)]
    words = []
    for row, start in zip(rows, starts, strict=True):
        begin = f" from {start}" if start is not None else ""
        end = f" up to {row.max_batch}" if row.max_batch is not None else ""
        words.append(f"{row.set_name}{begin}{end}" if begin or end else f"{row.set_name} always")
    return ", ".join(words)


def _head(outcome: Outcome) -> Iterator[str]:
    key, request = outcome.measured.key, outcome.request
    yield f"# Routing of {printable(outcome.folder.resolve().name)} on {printable(key.device)}\n"
    split = ""
    if key.tensor_parallel_size > 1:
        split = f" --tensor-parallel-size {key.tensor_parallel_size}"
    yield f"    vllm-qoq tune {printable(str(outcome.folder))} --prefer {request.prefer}{split}\n"
    yield (
        f"vllm-qoq {key.vllm_qoq}, vLLM {key.vllm}, tensor-parallel size "
        f"{key.tensor_parallel_size}, measured {'before' if outcome.is_remembered else 'now'}.\n"
        "Milliseconds of all linear layers of a step, in decode with the lm_head; attention,\n"
        "norms and sampling, equal for all sets, are left out.\n"
    )
    yield (
        f"By accuracy: {', '.join(outcome.order)}. Taken is the first that is at most "
        f"{SLOWER[request.prefer]:.0%} slower than the fastest.\n"
    )


def _decode(outcome: Outcome) -> Iterator[str]:
    estimates, route = outcome.measured.estimates(), outcome.routing.route([])
    yield "## Decode\n"
    rows = [
        [
            str(batch),
            *(f"{1e3 * times[name]:.3f}" for name in outcome.order),
            route.choose(Step(Phase.DECODE, batch)),
        ]
        for batch, times in estimates.decode.items()
    ]
    yield markdown_table(["batch", *outcome.order, "chosen"], rows)
    decode = outcome.measured.decode
    yield f"Fastest: {crossings(fastest(estimates, outcome.order), decode)}."
    yield f"Chosen: {crossings(outcome.routing.decode, decode)}.\n"


def _prefill(outcome: Outcome) -> Iterator[str]:
    estimates = outcome.measured.estimates()
    yield "## Prefill\n"
    rows = [
        [str(tokens), *(f"{1e3 * times[name]:.3f}" for name in outcome.order)]
        for tokens, times in estimates.prefill.items()
    ]
    yield markdown_table(["tokens", *outcome.order], rows)
    per_token = estimates.prefill_per_token()
    best = min(per_token.values())
    yield (
        f"Chosen: {outcome.routing.prefill}. Time of a token against the fastest, mean of the "
        "sizes:\n" + ", ".join(f"{n} {per_token[n] / best:.2f}" for n in outcome.order) + ".\n"
    )


def _check(outcome: Outcome) -> Iterator[str]:
    checked = outcome.check
    if checked is None or not checked.routed:
        return
    yield "## Check\n"
    yield (
        "Milliseconds of the model in whole decode steps of short requests, without lm_head and\n"
        "sampling, with each set alone and with the routing.\n"
    )
    rows = [
        [
            str(batch),
            *(f"{1e3 * checked.step_seconds[batch][name]:.3f}" for name in outcome.order),
            f"{1e3 * routed:.3f}",
            f"{checked.slowdown(batch):+.1%}",
        ]
        for batch, routed in checked.routed.items()
    ]
    yield markdown_table(["batch", *outcome.order, "routing", "against the best"], rows)


def _routing(outcome: Outcome) -> Iterator[str]:
    verb = "would be written to" if outcome.request.dry_run else "written to"
    yield f"## Routing, {verb} config.json\n"
    yield f"    {json.dumps(outcome.routing.to_json())}\n"
    unused = [name for name in outcome.order if name not in outcome.routing.sets()]
    notes = [*outcome.notes]
    if unused:
        notes.append(f"not reached, so not loaded when serving: {', '.join(unused)}")
    if outcome.routing == outcome.before:
        notes.append("the routing was the same before")
    yield from (f"- {printable(note)}" for note in notes)


def _milliseconds(times: Mapping[int, Mapping[str, float]]) -> dict[int, dict[str, float]]:
    return {size: {name: 1e3 * s for name, s in row.items()} for size, row in times.items()}


def _check_json(outcome: Outcome) -> dict[str, Any] | None:
    checked = outcome.check
    if checked is None:
        return None
    return {
        str(batch): {
            "sets_milliseconds": {n: 1e3 * s for n, s in checked.step_seconds[batch].items()},
            "routing_milliseconds": 1e3 * routed,
            "slowdown": checked.slowdown(batch),
        }
        for batch, routed in checked.routed.items()
    }
