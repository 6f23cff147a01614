"""The result as a picture: how far every kernel is from the roof, layer by layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from vllm_qoq.bench.cases import OURS, Case
from vllm_qoq.bench.result import Result
from vllm_qoq.bench.roofline import INT8_RATE, floor_seconds, operations

_COLUMNS = 2
_ROOF = "qoq-g128"
# Kernel -> colour, line and marker.
_STYLES = {
    "qoq-g128": ("tab:red", "o-"),
    "qoq-channel": ("tab:orange", "o-"),
    "qoq-nested": ("tab:brown", "D-"),
    "humming-g128": ("tab:blue", "s--"),
    "cutlass-int8": ("tab:green", "^--"),
    "cublas-bf16": ("tab:gray", "v:"),
}
_BEST_RIVAL = ("black", ".:")


def save(result: Result, path: Path) -> None:
    """A panel per layer: TOPS over M under the roof of memory and of int8 tensor cores."""
    from matplotlib.figure import Figure

    layers = list(zip(*map(result.cases, result.tokens), strict=True))
    rows = math.ceil(len(layers) / _COLUMNS)
    figure = Figure(figsize=(6.2 * _COLUMNS, 4.2 * rows), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for axes, cases in zip(panels, layers, strict=True):
        _panel(axes, result, list(cases))
    figure.suptitle(
        f"W4A8 GEMM, {result.model}, {result.device}\n"
        f"roof: {result.copy_rate / 1e12:.2f} TB/s (copy), "
        f"{INT8_RATE / 1e12:.0f} TOPS (int8, measured on an H200), weights of {OURS[_ROOF]} bits"
    )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


def _panel(axes: Any, result: Result, cases: list[Case]) -> None:
    ends = cases[0].m, cases[-1].m
    steps = sorted({*ends, *(round(2 ** (i / 8)) for i in range(160))})
    under = [cases[0]._replace(m=m) for m in steps if ends[0] <= m <= ends[1]]
    roof = [floor_seconds(_ROOF, case, result.copy_rate) for case in under]
    _line(axes, under, list(roof), "roof", "tab:purple", "-")
    for name, (colour, style) in _STYLES.items():
        if name in result.kernels:
            times = [result.seconds[case].get(name) for case in cases]
            _line(axes, cases, times, name, colour, style)
    rivals = [result.best_rival(case) for case in cases]
    _line(axes, cases, rivals, "best W4A8 or W8A8 peer", *_BEST_RIVAL)
    axes.set(
        title=f"{cases[0].layer}, N={cases[0].n} K={cases[0].k}",
        xscale="log",
        yscale="log",
        xlabel="M (tokens)",
        ylabel="TOPS",
    )
    axes.minorticks_off()
    axes.set_xticks([case.m for case in cases], [str(case.m) for case in cases])
    axes.grid(alpha=0.3)


def _line(
    axes: Any, cases: list[Case], seconds: list[float | None], label: str, colour: str, style: str
) -> None:
    """A missing time interrupts the line."""
    rates = [
        operations(case) / time / 1e12 if time else math.nan
        for case, time in zip(cases, seconds, strict=True)
    ]
    axes.plot([case.m for case in cases], rates, style, color=colour, label=label, markersize=4)
