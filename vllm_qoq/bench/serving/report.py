"""The report of `bench serving`: Markdown that is readable in a terminal, too."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from vllm_qoq.bench.report import number
from vllm_qoq.bench.serving.cases import BATCHES, LENGTHS, MOST, Lengths
from vllm_qoq.bench.serving.formats import DEFAULT, Measurable
from vllm_qoq.bench.serving.records import Measured
from vllm_qoq.bench.serving.result import Engine, Result
from vllm_qoq.markdown import markdown_table
from vllm_qoq.plots import speed


def markdown(result: Result) -> str:
    """Write the whole of serving.md: the finding, the best batches, a table a number."""
    parts = [*_head(result)]
    for lengths in result.lengths:
        parts += [*_best(result, lengths), *_tables(result, lengths)]
    return "\n".join((*parts, *_left_out(result)))


def finding(result: Result, lengths: Lengths) -> str:
    """Say in one sentence how our highest throughput compares with vLLM's."""
    place = f"at {lengths.prompt} tokens in, {lengths.new} out"
    ours, peer, ratio = (
        result.best_of_ours(lengths),
        result.best_peer(lengths),
        result.speedup(lengths),
    )
    if ours and peer and ratio is not None:
        is_cut = "" if not (ours.left_out or peer.left_out) else ", though batches are missing"
        return f"Our {ours.name} is {speed(ratio, peer.name)} {place}{is_cut}"
    best = ours or peer
    run = best and best.best(lengths)
    if not best or not run:
        return f"Nothing was measured {place}"
    return f"With {best.name} vLLM generates {run.tokens_per_second:,.0f} tokens a second {place}"


def command(result: Result) -> str:
    """Write the command line that measures the same again."""
    parts = command_start(result.model, result.engines)
    if result.lengths != LENGTHS:
        parts.append(f"--lengths {','.join(map(str, result.lengths))}")
    if result.batches != BATCHES:
        parts.append(f"--batches {','.join(result.batches)}")
    if result.most != MOST:
        parts.append(f"--max-batch {result.most}")
    if result.repeats != 1:
        parts.append(f"--repeats {result.repeats}")
    return " ".join([*parts, *engine_options(result.engine_args)])


def command_start(model: str | None, engines: Iterable[Measurable]) -> list[str]:
    """Write the parts of a command line that name what is measured."""
    engines = tuple(engines)
    parts = ["vllm-qoq bench serving", *([shlex.quote(model)] if model else ())]
    names = tuple(engine.name for engine in engines if engine.format)
    if names and names != DEFAULT:
        parts.append(f"--formats {','.join(names)}")
    return parts + [f"--checkpoint {one.name}=DIR" for one in engines if not one.format]


def engine_options(engine_args: Mapping[str, Any]) -> list[str]:
    """Write the part of a command line with the arguments of all engines."""
    if not engine_args:
        return []
    return [f"--engine-args {shlex.quote(json.dumps(dict(engine_args)))}"]


def how_compiled(engine_args: Mapping[str, Any]) -> str:
    """Say whether the user's arguments leave compilation and CUDA graphs as vLLM has them."""
    if engine_args.keys() & {"enforce_eager", "compilation_config", "optimization_level"}:
        return "compiled as the arguments of all engines say"
    return "with vLLM's default compilation and CUDA graphs"


def _head(result: Result) -> Iterator[str]:
    yield f"# Serving, {result.model or 'checkpoints'}, {result.device}\n"
    yield f"    {command(result)}\n"
    yield (
        "All requests arrive together; the prompts are random tokens. Tokens a second: new tokens\n"
        "over the time from the first request to the last token, prompts included. All engines of\n"
        f"one run, each in a process of its own, {how_compiled(result.engine_args)}.\n"
    )
    if result.limits:
        rates = ", ".join(
            f"{name} {rate / 1e12:.0f}" for name, rate in result.limits.operations.items()
        )
        yield (
            f"Floor: the bytes of weights and cache at {result.limits.copy_rate / 1e12:.2f} TB/s, "
            f"the speed of a copy, or the\noperations of the fastest product ({rates} T/s), "
            "whichever takes longer; all\nmeasured in this run.\n"
        )
    packages = result.environment["packages"]
    yield ", ".join(f"{name} {found}" for name, found in packages.items() if found) + ".\n"


def _best(result: Result, lengths: Lengths) -> Iterator[str]:
    yield f"## {lengths.prompt} in, {lengths.new} out: highest throughput\n"
    yield f"{finding(result, lengths)}. Each at its best batch:\n"
    rows = [_best_row(result, engine, lengths) for engine in result.engines]
    heads = ["", "tokens/s", "batch", "of the floor", "step, ms", "weights, GiB", "pool, tokens"]
    yield markdown_table(heads, rows)


def _best_row(result: Result, engine: Engine, lengths: Lengths) -> list[str]:
    best, facts = engine.best(lengths), engine.facts
    cells = ["-"] * 4
    if best is not None:
        cells = [
            f"{best.tokens_per_second:,.0f}",
            str(best.batch),
            number(result.share_of_floor(engine, best), ".0%"),
            number(_milliseconds(best.step_seconds), ".2f"),
        ]
    pool = f"{facts.pool_tokens:,}" if facts else "-"
    return [engine.name, *cells, number(engine.weights_gib, ".2f"), pool]


def _tables(result: Result, lengths: Lengths) -> Iterator[str]:
    batches = sorted({batch for engine in result.engines for batch in engine.at(lengths)})
    numbers: dict[str, tuple[Callable[[Engine, Measured], float | None], str]] = {
        "tokens a second": (lambda _, one: one.tokens_per_second, ",.0f"),
        "a decode step, ms": (lambda _, one: _milliseconds(one.step_seconds), ".3f"),
        "until all prompts are read, ms": (lambda _, one: 1e3 * one.prompts_seconds, ",.1f"),
        "tokens a second, share of the floor": (result.share_of_floor, ".0%"),
        "a decode step, share of the floor": (result.share_of_step_floor, ".0%"),
        "KV cache at the end, GiB": (result.cache_gib, ".2f"),
    }
    for title, (value, form) in numbers.items():
        rows = [
            [
                engine.name,
                *(
                    number(value(engine, found[batch]), form) if batch in found else "-"
                    for batch in batches
                ),
            ]
            for engine in result.engines
            for found in [engine.at(lengths)]
        ]
        if any(cell != "-" for row in rows for cell in row[1:]):
            yield f"### {lengths}: {title}\n"
            yield markdown_table(["batch", *map(str, batches)], rows)


def _left_out(result: Result) -> Iterator[str]:
    missing = [
        f"- {engine.name}: {why}"
        for engine in result.engines
        for why in (engine.left_out, engine.too_large)
        if why
    ]
    if missing:
        yield "Left out:\n"
        yield from missing
        yield ""


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
