"""The picture of `bench serving --online`: latency, goodput and tokens over the request rate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_qoq import plots
from vllm_qoq.bench.serving.online.load import in_words
from vllm_qoq.bench.serving.online.report import ENOUGH_IN_WORDS, finding
from vllm_qoq.bench.serving.online.result import ENOUGH, Online
from vllm_qoq.bench.serving.plot import line

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vllm_qoq.bench.serving.online.records import Measured


def save(result: Online, path: Path) -> None:
    """Write the picture as a PNG."""
    plots.save(figure(result), path)


def figure(result: Online) -> Figure:
    """Draw six panels with a line for each server."""
    load = result.load
    drawn = plots.figure(
        finding(result),
        f"{result.model or 'Checkpoints'} on one {result.device}, {load.lengths.prompt} tokens in, "
        f"{load.lengths.new} out, Poisson arrivals.\nObjective (dotted): "
        f"{in_words(load.objective)}.",
        height=7.4,
    )
    panels = drawn.subplots(3, 2)
    (ttft, ttft_p99), (tpot, share), (goodput, tokens) = panels
    most = load.objective
    _times(ttft, result, "Time to first token, median", lambda one: one.ttft_ms, most.get("ttft"))
    _times(
        ttft_p99, result, "Time to first token, 99th percentile",
        lambda one: one.ttft_p99_ms, most.get("ttft"),
    )  # fmt: skip
    _times(tpot, result, "Time per output token, median", lambda one: one.tpot_ms, most.get("tpot"))
    _panel(share, result, "Requests that meet the objective", lambda one: 100 * one.share)
    share.axhline(100 * ENOUGH, color=plots.GREY, linestyle=":", linewidth=1)
    share.set_ylim(0, 105)
    share.set_ylabel(f"%, dotted: {ENOUGH_IN_WORDS}")
    rates = _panel(goodput, result, "Goodput", lambda one: one.goodput)
    asked = sorted({one.rate for server in result.servers for one in server.measured})
    goodput.plot(asked, asked, color=plots.GREY, linestyle=":", linewidth=1)
    plots.values_axis(goodput, [*rates, *asked], "requests/s, dotted: all", may_be_log=False)
    found = _panel(tokens, result, "Throughput", lambda one: one.tokens_per_second)
    plots.values_axis(tokens, found, "new tokens/s", may_be_log=False)
    handles, labels = ttft.get_legend_handles_labels()
    drawn.legend(
        handles, labels, loc="outside lower center", ncols=3, fontsize=plots.SMALL, frameon=False
    )
    return drawn


def _times(
    axes: Axes,
    result: Online,
    title: str,
    value: Callable[[Measured], float],
    most: float | None,
) -> None:
    """Draw milliseconds, and the objective where it is among them."""
    values = _panel(axes, result, title, value)
    plots.values_axis(axes, values, "ms")
    if most is not None and most <= axes.get_ylim()[1]:
        axes.axhline(most, color=plots.GREY, linestyle=":", linewidth=1)


def _panel(
    axes: Axes, result: Online, title: str, value: Callable[[Measured], float]
) -> list[float]:
    """Draw a number over the rate; returns all of its values."""
    names = [server.name for server in result.servers]
    values: list[float] = []
    for server in result.servers:
        found = [value(one) for one in server.by_rate.values()]
        line(axes, list(server.by_rate), found, server, names)
        values += found
    rates = {one.rate for server in result.servers for one in server.measured}
    plots.sizes_axis(axes, sorted(rates), "requests a second")
    plots.panel_title(axes, title)
    plots.tidy(axes)
    return values
