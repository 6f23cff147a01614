"""The picture of `bench attention`: how long each cache takes, and how fast it is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_qoq import plots
from vllm_qoq.bench.attention_cases import OURS, PEERS, Decode
from vllm_qoq.bench.attention_result import AttentionResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The marker of each kernel.
_MARKERS = {
    "qoq-kv4": "o",
    "qoq-kv8": "o",
    "qoq-k8v4": "o",
    "fa3-bf16": "v",
    "fa3-fp8": "s",
    "triton-int4": "^",
    "turboquant-4bit": "D",
}


def save(result: AttentionResult, path: Path) -> None:
    """Write the picture as a PNG."""
    plots.save(figure(result, ratios(result)), path)


def figure(result: AttentionResult, ratios: Mapping[Decode, float]) -> Figure:
    """Draw microseconds over the cases, and TB/s beside the rate of a copy.

    ratios  the result of `ratios`, or the figures of a report
    """
    heads, ours = result.heads, _subject(result)
    subtitle = (
        f"One token for each of several sequences, one layer, {heads.query} query and {heads.kv} "
        f"KV heads of {heads.size}, on one {result.device}."
    )
    if ratios:
        label = plots.METHODS[ours].label
        subtitle += f"\nAt the points: time of the fastest other cache / time of {label}."
    drawn = plots.figure(_title(ours, ratios), subtitle, height=7.4)
    times, rates = drawn.subplots(2, 1, height_ratios=(1.25, 1))
    _lines(times, result, _micro)
    _lines(rates, result, _tera)
    copy = result.copy_rate / 1e12
    rates.axhline(copy, color=plots.INK, linewidth=1.2, linestyle="-.")
    for axes, unit in ((times, "microseconds a call"), (rates, "TB/s of the cache")):
        values = [y for line in axes.get_lines() for y in line.get_ydata()]
        plots.values_axis(axes, values, unit, may_be_log=axes is times)
        axes.set_xticks(range(len(result.cases)), list(map(str, result.cases)))
        axes.grid(alpha=0.25)
        plots.tidy(axes)
        _names(axes, result, _micro if axes is times else _tera)
    rates.text(0, copy, f"a copy: {copy:.2f} TB/s", va="bottom", size=plots.SMALL)
    rates.set_xlabel("sequences x tokens of each")
    for place, case in enumerate(result.cases):
        if case in ratios:
            times.annotate(
                plots.times(ratios[case]), (place, _micro(result, ours, case)), (0, -7),
                textcoords="offset points", ha="center", va="top", size=plots.SMALL,
                color=plots.METHODS[ours].colour, weight="bold",
            )  # fmt: skip
    if ratios:
        low, high = times.get_ylim()
        times.set_ylim(low / 1.5 if times.get_yscale() == "log" else low, high)
    return drawn


def ratios(result: AttentionResult) -> dict[Decode, float]:
    """Divide the fastest peer's time by our first kernel's, in the cases that have both."""
    ours, found = _subject(result), {}
    for case in result.cases:
        seconds = result.seconds[case]
        peers = [seconds[name] for name in PEERS if name in seconds]
        if ours in seconds and peers:
            found[case] = min(peers) / seconds[ours]
    return found


def _subject(result: AttentionResult) -> str:
    return next((name for name in OURS if name in result.kernels), "")


def _title(ours: str, ratios: Mapping[Decode, float]) -> str:
    if not ratios:
        return "Decode attention over caches of several widths"
    places = {f"at {case}": ratio for case, ratio in ratios.items()}
    bits = ours.removeprefix("qoq-kv")
    width = f"{bits}-bit" if bits != ours else ours.removeprefix("qoq-")
    peer = "vLLM's fastest other cache"
    return f"Attention over our {width} KV cache is {plots.speed_range(places, peer)}"


def _lines(axes: Axes, result: AttentionResult, value: Callable[..., float]) -> None:
    """Draw markers, and thin lines to follow them by; a missing number interrupts both."""
    for name in result.kernels:
        found = plots.METHODS[name]
        line = [value(result, name, case) for case in result.cases]
        places = range(len(line))
        axes.plot(places, line, color=found.colour, linewidth=1.2, alpha=0.45)
        axes.plot(places, line, _MARKERS[name], color=found.colour, markersize=5.5)


def _names(axes: Axes, result: AttentionResult, value: Callable[..., float]) -> None:
    """Write the name of each kernel behind its last point."""
    ends = []
    for name in result.kernels:
        line = [value(result, name, case) for case in result.cases]
        known = [(x, y) for x, y in enumerate(line) if not math.isnan(y)]
        ends += [(*known[-1], plots.METHODS[name])] if known else []
    plots.end_labels(axes, ends)


def _tera(result: AttentionResult, name: str, case: Decode) -> float:
    rate = result.rate(name, case)
    return math.nan if rate is None else rate / 1e12


def _micro(result: AttentionResult, name: str, case: Decode) -> float:
    return 1e6 * result.seconds[case].get(name, math.nan)
