"""The picture of `bench serving`: tokens a second over the batch, and the memory beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_qoq import plots
from vllm_qoq.bench.serving.cases import Lengths
from vllm_qoq.bench.serving.formats import Measurable
from vllm_qoq.bench.serving.report import finding
from vllm_qoq.bench.serving.result import Result

# The line and marker of each cache; the colour is that of the weights.
_LINES = {"16": "v:", "fp8": "s--", "8": "D-.", "k8v4": "P-", "4": "o-"}

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def save(result: Result, path: Path) -> None:
    """Write the picture as a PNG."""
    plots.save(figure(result), path)


def figure(result: Result) -> Figure:
    """Draw, for each pair of lengths, tokens a second and memory over the batch."""
    card = f"one {result.device}" if result.is_on_one_card else f"several {result.device}"
    drawn = plots.figure(
        finding(result, result.lengths[0]),
        f"{result.model or 'Checkpoints'} on {card}; all requests arrive together. "
        "Tokens a second at the best batch are compared.",
        height=3.1 * len(result.lengths) + 0.5,
    )
    names = [engine.name for engine in result.engines]
    panels = drawn.subplots(len(result.lengths), 2, squeeze=False)
    for (speed, memory), lengths in zip(panels, result.lengths, strict=True):
        _throughput(speed, result, lengths, names)
        _memory(memory, result, lengths, names)
    handles, labels = panels[0][0].get_legend_handles_labels()
    drawn.legend(
        handles, labels, loc="outside lower center", ncols=3, fontsize=plots.SMALL, frameon=False
    )
    return drawn


def _throughput(axes: Axes, result: Result, lengths: Lengths, names: Sequence[str]) -> None:
    batches: set[int] = set()
    rates = [0.0]
    for engine in result.engines:
        found = engine.at(lengths)
        values = [one.tokens_per_second for one in found.values()]
        line(axes, list(found), values, engine, names)
        batches |= set(found)
        rates += values
    plots.sizes_axis(axes, sorted(batches), "requests of a batch")
    axes.set_ylim(0, 1.08 * max(rates))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylabel("new tokens a second")
    plots.panel_title(axes, f"Throughput, {lengths.prompt} tokens in, {lengths.new} out")
    plots.tidy(axes)


def _memory(axes: Axes, result: Result, lengths: Lengths, names: Sequence[str]) -> None:
    batches: set[int] = set()
    for engine in result.engines:
        found = {
            batch: cache + (engine.weights_gib or 0)
            for batch, one in engine.at(lengths).items()
            if (cache := result.cache_gib(engine, one)) is not None
        }
        line(axes, list(found), list(found.values()), engine, names)
        batches |= set(found)
    if not batches:
        axes.set_axis_off()
        return
    plots.sizes_axis(axes, sorted(batches), "requests of a batch")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("GiB")
    plots.panel_title(axes, "Memory of weights and KV cache")
    plots.tidy(axes)


def line(
    axes: Axes, x: Sequence[float], y: Sequence[float], engine: Measurable, names: Sequence[str]
) -> None:
    """Draw an engine's line: the colour is that of its weights, the marker that of its cache."""
    how = engine.format
    kind = how.weights_name.removesuffix("-head8") if how else engine.name
    axes.plot(
        x, y, _LINES[how.cache if how else "16"], color=plots.method(kind, names).colour,
        markersize=4, linewidth=2 if engine.is_ours else 1.3,
        label=f"{engine.name}, ours" if engine.is_ours else engine.name,
    )  # fmt: skip
