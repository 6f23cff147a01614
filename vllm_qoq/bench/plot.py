"""The picture of `bench gemm`: how much faster ours is, and how far kernels are from the limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_qoq import plots
from vllm_qoq.bench.cases import OURS, Case
from vllm_qoq.bench.result import Result, speedups

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 2
_LIMIT = "qoq-g128"
_PEER = "the best other 8-bit kernel"
# The line and marker of each kernel.
_LINES = {
    "cublas-bf16": "v:",
    "humming-g128": "s--",
    "cutlass-int8": "^--",
    "qoq-nested": "D-",
    "qoq-channel": "o-",
    "qoq-g128": "o-",
}


def save(result: Result, path: Path) -> None:
    """Write the picture as a PNG."""
    plots.save(figure(result, ratios(result)), path)


def figure(result: Result, ratios: Mapping[int, float]) -> Figure:
    """Draw the ratios to the best peer, and a panel per layer: times over M, relative to the limit.

    ratios  the result of `ratios`, or the figures of a report
    """
    layers = list(zip(*map(result.cases, result.tokens), strict=True))
    rows = math.ceil(len(layers) / _COLUMNS)
    drawn = plots.figure(
        _title(ratios),
        f"GEMMs of {result.model} on one {result.device}. The limit of W4A8 on this card: weights "
        f"of {OURS[_LIMIT]} bits, inputs and outputs at {result.copy_rate / 1e12:.2f} TB/s (a "
        f"copy), or {result.int8_rate.operations / 1e12:.0f} TOPS ({result.int8_rate.source}).",
        height=2.7 * rows + (2.1 if ratios else 0.3),
    )
    shapes = [1.7] * bool(ratios) + [2.7] * rows
    grid = drawn.add_gridspec(len(shapes), _COLUMNS, height_ratios=shapes)
    if ratios:
        _bars(drawn.add_subplot(grid[0, :]), ratios)
    names = [name for name in _LINES if name in result.kernels]
    for place, cases in enumerate(layers):
        row, column = divmod(place, _COLUMNS)
        axes = drawn.add_subplot(grid[row + bool(ratios), column])
        _panel(axes, result, cases, names, is_first=column == 0)
    handles, _ = drawn.axes[-1].get_legend_handles_labels()
    drawn.legend(
        handles=handles, loc="outside lower center", ncols=4, fontsize=plots.SMALL, frameon=False
    )
    return drawn


def ratios(result: Result) -> dict[int, float]:
    """Divide the best peer's time by ours, for the numbers of tokens where all layers have both."""
    found = speedups(result).get("best W4A8 or W8A8 peer", ())
    return {m: ratio for m, ratio in zip(result.tokens, found, strict=False) if ratio is not None}


def _title(ratios: Mapping[int, float]) -> str:
    if not ratios:
        return "Times of the kernels beside the limit of the card"
    places = {f"at M={m}": ratio for m, ratio in ratios.items()}
    return f"Our W4A8 GEMM is {plots.speed_range(places, _PEER)}"


def _bars(axes: Axes, ratios: Mapping[int, float]) -> None:
    for place, ratio in enumerate(ratios.values()):
        colour = plots.METHODS[_LIMIT].colour if ratio >= 1 else plots.GREY
        axes.bar(place, ratio, color=colour, width=0.7)
        axes.text(
            place, ratio + 0.03, plots.times(ratio), ha="center", va="bottom", color=colour,
            size=plots.SMALL + 1, weight="bold",
        )  # fmt: skip
    axes.axhline(1, color=plots.INK, linewidth=1)
    axes.set_xticks(range(len(ratios)), list(map(str, ratios)))
    axes.set(ylim=(0, 1.2 * max(*ratios.values(), 1)), yticks=[0, 1], xlabel="M (tokens)")
    axes.set_ylabel("speed, best other = 1")
    plots.panel_title(
        axes, "W4A8, ours, against the fastest other W4A8 or W8A8 kernel, mean of the layers"
    )
    plots.tidy(axes)


def _panel(
    axes: Axes, result: Result, cases: Sequence[Case], names: Sequence[str], is_first: bool
) -> None:
    """Draw the panel of a layer; a missing time interrupts the line."""
    floors = [result.floor_seconds(_LIMIT, case) for case in cases]
    sizes = [case.m for case in cases]
    shown = []
    for name in names:
        seconds = [result.seconds[case].get(name, math.nan) for case in cases]
        line = [time / floor for time, floor in zip(seconds, floors, strict=True)]
        found = plots.METHODS[name]
        axes.plot(sizes, line, _LINES[name], color=found.colour, label=found.label, markersize=4)
        shown += line
    axes.axhline(1, color=plots.INK, linewidth=1.2, linestyle="-.", label="limit of the card")
    plots.sizes_axis(axes, sizes, "M (tokens)")
    plots.values_axis(axes, [*shown, 1], "time / limit" if is_first else "")
    plots.panel_title(axes, f"{cases[0].layer}, N={cases[0].n} K={cases[0].k}")
    axes.grid(axis="y", alpha=0.25)
    plots.tidy(axes)
