"""The picture of a tuning: how long each set takes, and where the routing switches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_qoq import plots
from vllm_qoq.errors import printable
from vllm_qoq.routing.table import Routing
from vllm_qoq.tuner.job import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def save(outcome: Outcome, path: Path) -> None:
    """Write the picture as a PNG."""
    plots.save(figure(outcome), path)


def figure(outcome: Outcome) -> Figure:
    """Draw decode and prefill side by side, each chosen set's colour in the background."""
    estimates, names = outcome.measured.estimates(), outcome.measured.sets
    styles = {name: plots.method(name, names)._replace(label=name) for name in names}
    model = printable(outcome.folder.resolve().name)
    drawn = plots.figure(
        _title(estimates.decode, outcome.routing),
        f"Linear layers of {model}, {printable(outcome.measured.key.device)}. "
        f"Chosen by --prefer {outcome.request.prefer} (background): {_words(outcome.routing)}.",
        height=3.6,
    )
    decode, prefill = drawn.subplots(1, 2)
    steps = {b: {n: 1e3 * s for n, s in row.items()} for b, row in estimates.decode.items()}
    tokens = {m: {n: 1e6 * s / m for n, s in row.items()} for m, row in estimates.prefill.items()}
    _lines(decode, steps, styles, unit="ms a step", size="batch")
    _lines(prefill, tokens, styles, unit="us a token", size="tokens of a prefill step")
    _shade(decode, outcome.routing, styles)
    prefill.set_facecolor((styles[outcome.routing.prefill].colour, 0.1))
    plots.panel_title(decode, "generation")
    plots.panel_title(prefill, "prompts")
    return drawn


def _title(decode: Mapping[int, Mapping[str, float]], routing: Routing) -> str:
    """Say how the set of the smallest step compares with the fastest other one there."""
    batch, row = next(iter(decode.items()))
    chosen = next(r.set_name for r in routing.decode if r.max_batch is None or batch <= r.max_batch)
    others = [name for name in row if name != chosen]
    if not others:
        return f"Every step runs in {chosen}"
    other = min(others, key=row.__getitem__)
    return f"At batch {batch} {chosen} is {plots.speed(row[other] / row[chosen], other)}"


def _words(routing: Routing) -> str:
    rows = [
        f"{row.set_name} beyond" if row.max_batch is None else f"{row.set_name} to {row.max_batch}"
        for row in routing.decode
    ]
    if len(rows) == 1:
        rows = [routing.decode[0].set_name]
    return f"generation {', '.join(rows)}; prompts {routing.prefill}"


def _lines(
    axes: Axes,
    values: Mapping[int, Mapping[str, float]],
    styles: Mapping[str, plots.Method],
    unit: str,
    size: str,
) -> None:
    for name, style in styles.items():
        line = [row[name] for row in values.values()]
        axes.plot(list(values), line, "o-", color=style.colour, markersize=4)
    plots.sizes_axis(axes, list(values), size)
    plots.values_axis(axes, [s for row in values.values() for s in row.values()], unit)
    axes.grid(axis="y", alpha=0.25)
    plots.tidy(axes)
    last, row = max(values.items())
    plots.end_labels(axes, [(last, row[name], style) for name, style in styles.items()])


def _shade(axes: Axes, routing: Routing, styles: Mapping[str, plots.Method]) -> None:
    limits = left, right = axes.get_xlim()
    for row in routing.decode:
        end = right if row.max_batch is None else min(row.max_batch, right)
        axes.axvspan(left, end, color=styles[row.set_name].colour, alpha=0.1, linewidth=0)
        left = end
    axes.set_xlim(limits)
