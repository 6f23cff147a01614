"""The picture of a comparison: the divergence of each kind of weights, a panel a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vllm_qoq import plots
from vllm_qoq.bench.evaluate import comparison
from vllm_qoq.bench.evaluate.comparison import Measured
from vllm_qoq.checkpoint.kv_config import short_name
from vllm_qoq.errors import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of a panel of half the width.
_MOST_TICKS = 6


def figure(rows: Sequence[Measured], ours: str, peers: Mapping[str, str], subtitle: str) -> Figure:
    """Draw the divergence of every row, a mark a precision of the KV cache.

    ours   name of the row that the title compares with the peers, both with a 16-bit cache
    peers  name of a row -> what the title calls it
    """
    names, texts = comparison.names(rows), comparison.texts(rows)
    drawn = plots.figure(title(rows, ours, peers), subtitle, height=1.4 + 0.27 * len(names))
    panels = drawn.subplots(1, len(texts), sharey=True, squeeze=False)[0]
    values = [row.score.divergence.value for row in rows]
    limits = (min(values) / 1.4, max(values) * 1.4)
    for axes, text in zip(panels, texts, strict=True):
        _panel(axes, [row for row in rows if row.text == text], names, limits)
        plots.panel_title(axes, printable(text))
    panels[0].set_yticks(range(len(names)), [printable(name) for name in names])
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    if ours in names:
        panels[0].get_yticklabels()[names.index(ours)].set_weight("bold")
    used = [bits for bits in comparison.KV_BITS if any(row.kv_bits == bits for row in rows)]
    plots.colour_names(drawn, [short_name(bits) for bits in used])
    return drawn


def title(rows: Sequence[Measured], ours: str, peers: Mapping[str, str]) -> str:
    """Say how many times as much as ours the peers lose, on the text where that is least."""
    ratios = {
        said: least
        for peer, said in peers.items()
        if (least := comparison.least_ratio(rows, peer, ours)) is not None
    }
    if not ratios:
        best = min(rows, key=lambda row: row.score.divergence.value)
        return f"{best.name} diverges least, by {best.score.divergence.value:.4f} nats a token"
    (first, ratio), *others = ratios.items()
    more = "".join(f", {said} {times:.1f} times" for said, times in others)
    return f"{first} has at least {ratio:.1f} times the divergence of {ours}{more}"


def _panel(
    axes: Axes, rows: Sequence[Measured], names: Sequence[str], limits: tuple[float, float]
) -> None:
    for place, bits in enumerate(comparison.KV_BITS):
        found = [row for row in rows if row.kv_bits == bits]
        axes.errorbar(
            [row.score.divergence.value for row in found],
            [names.index(row.name) + 0.18 * (place - 1.5) for row in found],
            xerr=[row.score.divergence.error for row in found],
            fmt="o", color=plots.METHODS[short_name(bits)].colour, markersize=3.5, capsize=0,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    ticks = plots.log_ticks(*limits, most=_MOST_TICKS)
    axes.set_xticks(ticks, [plots.plain(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("KL, nats a token (log scale)")
    axes.grid(axis="x", alpha=0.25)
    plots.tidy(axes)
    axes.tick_params(axis="y", length=0)
