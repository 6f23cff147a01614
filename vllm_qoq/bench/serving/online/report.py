"""The report of `bench serving --online`: Markdown that is readable in a terminal, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vllm_qoq.bench.report import number
from vllm_qoq.bench.serving.cases import LENGTHS
from vllm_qoq.bench.serving.online.load import (
    FEWEST,
    OBJECTIVE,
    RATES,
    SECONDS,
    as_option,
    in_words,
)
from vllm_qoq.bench.serving.online.records import Measured
from vllm_qoq.bench.serving.online.result import ENOUGH, Online, Served
from vllm_qoq.bench.serving.report import command_start, engine_options, how_compiled
from vllm_qoq.markdown import markdown_table
from vllm_qoq.plots import plain, speed

ENOUGH_IN_WORDS = f"{ENOUGH:.0%}".replace("%", " %")
NUMBERS: dict[str, tuple[Callable[[Measured], float], str]] = {
    "time to first token, median, ms": (lambda one: one.ttft_ms, ",.1f"),
    "time to first token, 99th percentile, ms": (lambda one: one.ttft_p99_ms, ",.1f"),
    "time per output token, median, ms": (lambda one: one.tpot_ms, ",.2f"),
    "goodput, requests a second": (lambda one: one.goodput, ",.2f"),
    "share of the requests that meet the objective": (lambda one: one.share, ".1%"),
    "tokens a second": (lambda one: one.tokens_per_second, ",.0f"),
}


def markdown(result: Online) -> str:
    """Write the whole of online.md: the finding, the rates that hold, a table a number."""
    return "\n".join((*_head(result), *_held(result), *_tables(result), *_left_out(result)))


def finding(result: Online) -> str:
    """Say in one sentence up to which rates ours and vLLM's best meet the objective."""
    ours, peer = result.best(is_ours=True), result.best(is_ours=False)
    best = [one for one in (ours, peer) if one]
    if not best:
        return "Nothing was measured"
    meet = f"{ENOUGH_IN_WORDS} of the requests meet the objective"
    named = [("our " if one.is_ours else "") + one.name for one in best]
    if not any(one.held_rate for one in best):
        return f"With {' and '.join(named)} less than {meet}, at every rate"
    reaches = [_reach(one) for one in best]
    if len(best) == 1:
        return f"With {named[0]} {meet} {reaches[0]}"
    if reaches[0] == reaches[1]:
        goodput = f"{best[0].goodput:.1f} against {best[1].goodput:.1f} requests a second"
        return (
            f"With {named[0]} as with {named[1]} {meet} {reaches[0]}; the highest goodput is "
            f"{goodput}"
        )
    return f"With {named[0]} {meet} {reaches[0]}, with {named[1]} {reaches[1]}"


def command(result: Online) -> str:
    """Write the command line that measures the same again."""
    load = result.load
    parts = command_start(result.model, result.servers)
    parts.insert(2 if result.model else 1, "--online")
    if (load.lengths,) != LENGTHS:
        parts.append(f"--lengths {load.lengths}")
    if load.rates != RATES:
        parts.append(f"--rates {','.join(map(plain, load.rates))}")
    if load.seconds != SECONDS:
        parts.append(f"--seconds {plain(load.seconds)}")
    if load.fewest != FEWEST:
        parts.append(f"--fewest {load.fewest}")
    if load.objective != OBJECTIVE:
        parts.append(f"--goodput {as_option(load.objective)}")
    return " ".join([*parts, *engine_options(result.engine_args)])


def _reach(server: Served) -> str:
    if not server.held_rate:
        return "at no rate"
    rate = f"{plain(server.held_rate)} a second"
    return f"still at {rate}, the highest that was tried" if server.holds_all else f"up to {rate}"


def _head(result: Online) -> Iterator[str]:
    load = result.load
    yield f"# Serving under load, {result.model or 'checkpoints'}, {result.device}\n"
    yield f"    {command(result)}\n"
    yield (
        f"Prompts of {load.lengths.prompt} random tokens, answers of {load.lengths.new}, sent by "
        "`vllm bench serve` to `vllm serve`, one\nserver after the other, "
        f"{how_compiled(result.engine_args)}.\nRequests come as a Poisson process, for all "
        f"servers at the same times: for {plain(load.seconds)} s at\neach rate, but at least "
        f"{load.fewest}.\n"
    )
    yield (
        f"Objective: {in_words(load.objective)}. Goodput: the requests a\nsecond that meet it, "
        "over the time from the first request to the last token.\n"
    )
    packages = result.environment["packages"]
    yield ", ".join(f"{name} {found}" for name, found in packages.items() if found) + ".\n"


def _held(result: Online) -> Iterator[str]:
    yield f"## {ENOUGH_IN_WORDS} of the requests meet the objective\n"
    yield f"{finding(result)}.\n"
    ours, peer, ratio = result.best(True), result.best(False), result.goodput_ratio
    if ours and peer and ratio is not None:
        faster = speed(ratio, peer.name)
        yield f"By the highest goodput at the rates of both, {ours.name} is {faster}.\n"
    heads = ["", "up to, requests/s", "highest goodput, requests/s", "weights, GiB"]
    rows = [
        [
            server.name,
            "-" if server.held_rate is None else plain(server.held_rate),
            number(server.goodput if server.measured else None, ".2f"),
            number(server.weights_gib, ".2f"),
        ]
        for server in result.servers
    ]
    yield markdown_table(heads, rows)


def _tables(result: Online) -> Iterator[str]:
    rates = sorted({rate for server in result.servers for rate in server.by_rate})
    for title, (value, form) in NUMBERS.items():
        rows = [
            [
                server.name,
                *(
                    format(value(server.by_rate[rate]), form) if rate in server.by_rate else "-"
                    for rate in rates
                ),
            ]
            for server in result.servers
        ]
        yield f"### {title[0].upper()}{title[1:]}\n"
        yield markdown_table(["requests a second", *map(plain, rates)], rows)


def _left_out(result: Online) -> Iterator[str]:
    missing = [server for server in result.servers if server.left_out]
    if missing:
        yield "Left out:\n"
        yield from (f"- {server.name}: {server.left_out}" for server in missing)
        yield ""
