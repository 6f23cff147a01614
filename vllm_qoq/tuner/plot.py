"""The result as a picture: how long each set takes, and where the routing switches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_qoq.errors import printable
from vllm_qoq.tuner.job import Outcome

_COLOURS = ("tab:blue", "tab:red", "tab:green", "tab:orange", "tab:purple", "tab:brown")


def save(outcome: Outcome, path: Path) -> None:
    """Decode and prefill side by side; the background has the colour of the chosen set."""
    from matplotlib.figure import Figure

    estimates = outcome.measured.estimates()
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(outcome.measured.sets)}
    figure = Figure(figsize=(12.4, 4.8), layout="constrained")
    decode, prefill = figure.subplots(1, 2)
    steps = {b: {n: 1e3 * s for n, s in row.items()} for b, row in estimates.decode.items()}
    tokens = {m: {n: 1e6 * s / m for n, s in row.items()} for m, row in estimates.prefill.items()}
    _lines(decode, steps, colours, "milliseconds a step", "batch")
    _lines(prefill, tokens, colours, "microseconds a token", "tokens of a prefill step")
    _shade(decode, outcome, colours)
    prefill.set_facecolor((colours[outcome.routing.prefill], 0.1))
    figure.suptitle(
        f"Linear layers of {printable(outcome.folder.resolve().name)}, "
        f"{printable(outcome.measured.key.device)}\n"
        f"background: chosen by --prefer {outcome.request.prefer}"
    )
    handles, labels = decode.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=110)


def _lines(
    axes: Any,
    values: Mapping[int, Mapping[str, float]],
    colours: Mapping[str, str],
    unit: str,
    size: str,
) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for name, colour in colours.items():
        line = [row[name] for row in values.values()]
        axes.plot(list(values), line, "o-", color=colour, label=name, markersize=4)
    axes.set(xscale="log", yscale="log", xlabel=size, ylabel=unit)
    powers = [m for m in values if m & (m - 1) == 0]
    axes.set_xticks(powers, [str(m) for m in powers])
    axes.set_xticks([], minor=True)
    # Plain numbers; on less than a decade, minor ticks are the only ones.
    numbers = [seconds for row in values.values() for seconds in row.values()]
    is_narrow = max(numbers) < 10 * min(numbers)
    plain = FuncFormatter(lambda value, _: f"{value:.3g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(plain if is_narrow else NullFormatter())
    axes.grid(alpha=0.3)


def _shade(axes: Any, outcome: Outcome, colours: Mapping[str, str]) -> None:
    limits = left, right = axes.get_xlim()
    for row in outcome.routing.decode:
        end = right if row.max_batch is None else row.max_batch
        axes.axvspan(left, end, color=colours[row.set_name], alpha=0.1, linewidth=0)
        left = end
    axes.set_xlim(limits)
