"""The picture of `bench table`: two bars a model, and how many times the longer is the other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_qoq import plots
from vllm_qoq.bench.serving.table import CUT, Table, best_of, finding

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEIGHT = 0.38
_LEAST = 1.6  # inches, of which one model leaves the axis and the legend too few
_OURS, _PEER = plots.METHODS["w4a8"].colour, plots.GREY


def save(table: Table, path: Path) -> None:
    """Write the picture as a PNG."""
    plots.save(figure(table), path)


def figure(table: Table) -> Figure:
    """Draw the best of vLLM's formats and ours, model by model."""
    from matplotlib.patches import Patch

    prompt, new = table.lengths.split("/")
    drawn = plots.figure(
        finding(table),
        f"New tokens a second, {prompt} tokens in and {new} out, each at its best batch; the time "
        "of the prompts is counted in. Dummy weights of the models' shapes.",
        height=max(0.62 * len(table.rows) + 0.7, _LEAST),
    )
    axes = drawn.subplots()
    longest = max(one.tokens_per_second for row in table.rows for one in (row.ours, row.peer))
    for place, row in enumerate(table.rows):
        for one, y, colour in (
            (row.peer, place - _HEIGHT / 2, _PEER),
            (row.ours, place + _HEIGHT / 2, _OURS),
        ):
            axes.barh(y, one.tokens_per_second, height=_HEIGHT, color=colour)
            text = f"{one.tokens_per_second:,.0f}"
            if one is row.ours:
                text = f"{text}   {plots.times(row.speedup)}"
            axes.text(
                one.tokens_per_second + 0.01 * longest, y, text, va="center", color=colour,
                size=plots.SMALL, weight="bold" if one is row.ours else "normal",
            )  # fmt: skip
    names = [
        f"{row.model}{CUT if row.ours.is_cut or row.peer.is_cut else ''}" for row in table.rows
    ]
    axes.set_yticks(range(len(table.rows)), names, parse_math=False)
    axes.set(xlim=(0, 1.22 * longest), ylim=(len(table.rows) - 0.5, -0.5))
    axes.set_xlabel("new tokens a second")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    plots.tidy(axes)
    axes.tick_params(axis="y", length=0)
    handles = [
        Patch(color=_PEER, label=best_of(table)),
        Patch(color=_OURS, label="ours"),
    ]
    drawn.legend(
        handles=handles, loc="outside lower center", ncols=2, fontsize=plots.SMALL, frameon=False
    )
    return drawn
