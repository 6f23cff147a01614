"""The picture of an evaluation: loss over the bytes of the weights, a line a KV cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_qoq import plots
from vllm_qoq.bench.evaluate.job import FLOAT, Evaluation, Row
from vllm_qoq.checkpoint.kv_config import Bits, short_name
from vllm_qoq.errors import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def save(found: Evaluation, path: Path) -> None:
    """Write the picture as a PNG."""
    plots.save(figure(found), path)


def figure(found: Evaluation) -> Figure:
    """Draw the divergence of every row over the bytes of its weights."""
    drawn = plots.figure(
        _title(found),
        f"{printable(found.checkpoint)} in vLLM against {printable(found.against)} in "
        f"transformers, {found.scored_tokens} tokens of {printable(found.text)} in windows of "
        f"{found.seqlen}. Bars are standard errors; lower and further left is better.",
        height=3.6,
    )
    axes = drawn.subplots()
    for bits in dict.fromkeys(row.kv_bits for row in found.rows):
        _line(axes, [row for row in found.rows if row.kv_bits == bits], bits)
    for name in dict.fromkeys(row.set_name for row in found.rows):
        _name(axes, [row for row in found.rows if row.set_name == name])
    axes.set_xlabel("weights (MB)")
    axes.set_ylabel("KL from the float model (nats a token)")
    axes.set_yscale("log")
    axes.grid(axis="y", alpha=0.25)
    axes.legend(fontsize=plots.SMALL, frameon=False)
    plots.tidy(axes)
    return drawn


def _title(found: Evaluation) -> str:
    sets = [row for row in found.rows if row.set_name != FLOAT]
    best, worst = (f(sets, key=lambda row: row.score.divergence.value) for f in (min, max))
    return f"{_words(best)} agrees on {_agreement(best)}, {_words(worst)} on {_agreement(worst)}"


def _words(row: Row) -> str:
    label = plots.METHODS[short_name(row.kv_bits)].label
    return f"{printable(row.set_name)} with a {label}"


def _agreement(row: Row) -> str:
    return f"{100 * row.score.agreement.value:.1f} % of next tokens"


def _line(axes: Axes, rows: list[Row], bits: Bits) -> None:
    rows = sorted(rows, key=lambda row: row.weight_bytes)
    style = plots.METHODS[short_name(bits)]
    sizes = [row.weight_bytes / 1e6 for row in rows]
    values = [row.score.divergence.value for row in rows]
    errors = [row.score.divergence.error for row in rows]
    axes.errorbar(
        sizes, values, errors, fmt="o-", color=style.colour, label=style.label, markersize=4,
        capsize=2,
    )  # fmt: skip


def _name(axes: Axes, rows: list[Row]) -> None:
    """Write the name of a set above its points, which are over each other."""
    highest = max(rows, key=lambda row: row.score.divergence.value)
    place = (highest.weight_bytes / 1e6, highest.score.divergence.value)
    axes.annotate(
        printable(highest.set_name), place, textcoords="offset points", xytext=(5, 4),
        size=plots.SMALL, color=plots.INK, parse_math=False,
    )  # fmt: skip
