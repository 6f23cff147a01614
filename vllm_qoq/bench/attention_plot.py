"""The result of `bench attention` as a picture: how fast each cache is read, and how long."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from vllm_qoq.bench.attention_cases import Decode
from vllm_qoq.bench.attention_result import AttentionResult

# Kernel -> colour, line and marker.
_STYLES = {
    "qoq-kv4": ("tab:red", "o-"),
    "qoq-kv8": ("tab:orange", "o-"),
    "fa3-bf16": ("tab:gray", "v--"),
    "fa3-fp8": ("tab:blue", "s--"),
    "triton-int4": ("tab:green", "^--"),
    "turboquant-4bit": ("tab:brown", "D--"),
}


def save(result: AttentionResult, path: Path) -> None:
    """Over the cases: TB/s under the rate of a copy, and microseconds."""
    from matplotlib.figure import Figure

    heads = result.heads
    figure = Figure(figsize=(12.4, 4.8), layout="constrained")
    rates, times = figure.subplots(1, 2)
    places = range(len(result.cases))
    for name in result.kernels:
        colour, style = _STYLES[name]
        for axes, value in ((rates, _tera), (times, _micro)):
            line = [value(result, name, case) for case in result.cases]
            axes.plot(places, line, style, color=colour, label=name, markersize=5)
    rates.axhline(result.copy_rate / 1e12, color="tab:purple", label="copy")
    rates.set(ylabel="TB/s of the cache", ylim=(0, None))
    times.set(ylabel="microseconds", yscale="log")
    for axes in (rates, times):
        axes.set_xticks(places, list(map(str, result.cases)), rotation=30)
        axes.set_xlabel("sequences x tokens")
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"Decode attention, {heads.query} query and {heads.kv} KV heads of {heads.size}, "
        f"{result.device}; a copy moves {result.copy_rate / 1e12:.2f} TB/s"
    )
    handles, labels = rates.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7)
    figure.savefig(path, dpi=110)


def _tera(result: AttentionResult, name: str, case: Decode) -> Any:
    """A missing number interrupts the line."""
    rate = result.rate(name, case)
    return math.nan if rate is None else rate / 1e12


def _micro(result: AttentionResult, name: str, case: Decode) -> Any:
    return 1e6 * result.seconds[case].get(name, math.nan)
