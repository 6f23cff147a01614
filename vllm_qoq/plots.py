"""The parts that all pictures share: a colour and a name per method, numbers, titles and axes.

Pictures are 8 inches wide, so that on a page of 800 pixels text has its size in points or more.
matplotlib is imported only when a picture is drawn.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.0  # inches
DPI = 160
SMALL = 9  # points
_TITLE, _TITLE_CHARACTERS = 12.5, 68
_SUBTITLE_CHARACTERS = 112
_LINE = 1.35 / 72  # inches of a line, per point
# A panel whose numbers differ by more than this has a logarithmic axis.
_WIDE_RANGE = 20

GREY = "#6e6e6e"
INK = "#222222"
_BLUE, _GREEN, _PURPLE = "#1f5fbf", "#0b8a5f", "#8e5bbf"
_RED, _DARK_RED, _ORANGE = "#d62f1f", "#8f1d14", "#cc7700"
_PINK, _LIGHT_PINK, _OLIVE, _BROWN = "#9c0f5f", "#e0559f", "#7d8a1c", "#8a5a44"
_MIDDLE_PINK = "#c2327f"


class Method(NamedTuple):
    """The name and the colour of a method in pictures."""

    label: str
    colour: str
    is_ours: bool = False


METHODS = {
    # Formats of weights and inputs.
    "bf16": Method("bf16", GREY),
    "fp8": Method("fp8", _BLUE),
    "w8a8": Method("W8A8", _GREEN),
    "w4a16": Method("W4A16", _PURPLE),
    "w4a8": Method("W4A8, ours", _RED, True),
    "nested": Method("nested, ours", _ORANGE, True),
    # Kernels of GEMMs.
    "cublas-bf16": Method("bf16, cuBLAS", GREY),
    "cutlass-fp8": Method("fp8, CUTLASS", _BLUE),
    "cutlass-int8": Method("W8A8, CUTLASS", _GREEN),
    "marlin-w4a16": Method("W4A16, Marlin", _PURPLE),
    "machete-w4a16": Method("W4A16, Machete", _PURPLE),
    "marlin-w4a8-int8": Method("W4A8, Marlin", _BROWN),
    "cutlass-w4a8-fp8": Method("W4A8 fp8, CUTLASS", _BROWN),
    "humming-g128": Method("W4A8, humming", _OLIVE),
    "humming-channel": Method("W4A8 per channel, humming", _OLIVE),
    "qoq-g128": Method("W4A8, ours", _RED, True),
    "qoq-channel": Method("W4A8 per channel, ours", _DARK_RED, True),
    "qoq-nested": Method("nested W8A8, ours", _ORANGE, True),
    # KV caches.
    "kv16": Method("16-bit KV cache", GREY),
    "kv8": Method("8-bit KV cache", _LIGHT_PINK, True),
    "k8v4": Method("k8v4 KV cache", _MIDDLE_PINK, True),
    "kv4": Method("4-bit KV cache", _PINK, True),
    "qoq-kv4": Method("4 bits, ours", _PINK, True),
    "qoq-kv8": Method("8 bits, ours", _LIGHT_PINK, True),
    "qoq-k8v4": Method("k8v4, ours", _MIDDLE_PINK, True),
    "fa3-bf16": Method("bf16, FA3", GREY),
    "fa3-fp8": Method("fp8, FA3", _BLUE),
    "triton-int4": Method("int4, Triton", _OLIVE),
    "turboquant-4bit": Method("TurboQuant", _BROWN),
}
_SPARE = (_BROWN, _OLIVE, _PINK, _BLUE, GREY, _LIGHT_PINK)


def method(name: str, others: Sequence[str] = ()) -> Method:
    """Find a method's entry; a name that nobody foresaw is its own label and has a spare colour.

    others  all names of the picture, so that unforeseen ones get different colours
    """
    if name in METHODS:
        return METHODS[name]
    unknown = [other for other in others if other not in METHODS]
    place = unknown.index(name) if name in unknown else 0
    return Method(name, _SPARE[place % len(_SPARE)])


# Words


def plain(value: float) -> str:
    """Write a number without an exponent: 0.5, 16, 65536."""
    return f"{value:.6f}".rstrip("0").rstrip(".") if value % 1 else f"{value:.0f}"


def times(ratio: float) -> str:
    """Write a ratio with two digits after the point: 1.47x."""
    return f"{ratio:.2f}x"


def speed(ratio: float, peer: str) -> str:
    """Say what our speed over the peer's means, also when we lose."""
    if times(ratio) == times(1):
        return f"as fast as {peer} (1.00x)"
    if ratio > 1:
        return f"{times(ratio)} as fast as {peer}"
    return f"slower than {peer} ({times(ratio)} as fast)"


def speed_range(ratios: Mapping[str, float], peer: str) -> str:
    """Say the best and the worst of several ratios, each with its place.

    ratios  place, "at batch 16" -> our speed over the peer's; not empty
    """
    best, worst = max(ratios, key=ratios.__getitem__), min(ratios, key=ratios.__getitem__)
    if times(ratios[best]) == times(ratios[worst]):
        return speed(ratios[best], peer)
    text = f"{speed(ratios[best], peer)} {best}"
    return f"{text}, {times(ratios[worst])} {worst}"


# Figures


def figure(title: str, subtitle: str, height: float) -> Figure:
    """Make a figure with the finding as its title and what was measured below it.

    height  inches without the titles
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    titles = _balanced(title, _TITLE_CHARACTERS)
    subtitles = [
        line for part in subtitle.split("\n") for line in _balanced(part, _SUBTITLE_CHARACTERS)
    ]
    first, second = len(titles) * _TITLE * _LINE, len(subtitles) * SMALL * _LINE
    margin = 0.1
    whole = height + first + second + 2 * margin
    room = ConstrainedLayoutEngine(rect=(0.01, 0.01, 0.98, height / whole - 0.01))
    drawn = Figure(figsize=(WIDTH, whole), layout=room)
    style: dict[str, Any] = {"va": "top", "linespacing": 1.2, "parse_math": False}
    drawn.text(
        margin / WIDTH, 1 - margin / whole, "\n".join(titles),
        size=_TITLE, weight="bold", color=INK, **style,
    )  # fmt: skip
    top = 1 - (margin + first) / whole
    drawn.text(margin / WIDTH, top, "\n".join(subtitles), size=SMALL, color=GREY, **style)
    return drawn


def _balanced(text: str, characters: int) -> list[str]:
    """Break `text` into as few lines as fit, of about the same length.

    A number keeps its percent sign on its line.
    """
    text = text.replace(" %", "\N{NO-BREAK SPACE}%")
    lines = textwrap.wrap(text, characters)
    for width in range(characters - 1, 0, -1):
        narrower = textwrap.wrap(text, width, break_long_words=False)
        if len(narrower) > len(lines) or max(map(len, narrower)) > width:
            break
        lines = narrower
    return lines


def save(drawn: Figure, path: Path) -> None:
    """Write a PNG, whose bytes are equal for equal numbers and the same matplotlib."""
    drawn.savefig(path, dpi=DPI, metadata={"Software": None})


def title_of(drawn: Figure) -> str:
    """Read the finding that a figure states."""
    return " ".join(drawn.texts[0].get_text().split())


# Axes


def tidy(axes: Axes) -> None:
    """Take two sides off the frame of a panel, and give its labels one size."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL)
    for part in (axes.xaxis.label, axes.yaxis.label):
        part.set_fontsize(SMALL)


def panel_title(axes: Axes, text: str) -> None:
    """Write the title of a panel above its left end."""
    axes.set_title(text, loc="left", size=SMALL + 0.5, weight="bold", color=INK)


def sizes_axis(axes: Axes, values: Sequence[float], label: str) -> None:
    """Draw a horizontal axis of sizes in powers of two, with ticks where something was measured.

    Where two sizes are less than four times apart, only the lower one has a tick.
    """
    shown: list[float] = []
    for value in sorted(values):
        if not shown or value >= 4 * shown[-1]:
            shown.append(value)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [plain(value) for value in shown])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(f"{label} (log scale)")


def values_axis(axes: Axes, values: Sequence[float], label: str, may_be_log: bool = True) -> None:
    """Draw a vertical axis from 0; it is logarithmic, and says so, where the range needs that."""
    known = [value for value in values if value == value]
    if not may_be_log or not known or max(known) <= _WIDE_RANGE * min(known):
        axes.set_ylim(0, 1.08 * max(known, default=1))
        axes.set_ylabel(label)
        axes.yaxis.set_major_formatter(lambda value, _: plain(value))
        return
    low, high = min(known) / 1.25, max(known) * 1.25
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    ticks = log_ticks(low, high)
    axes.set_yticks(ticks, [plain(value) for value in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylabel(f"{label} (log scale)")


def log_ticks(low: float, high: float, most: int = 9) -> list[float]:
    """Choose round numbers within the limits: at most `most`, unless powers of ten are more."""
    decades = [10.0**i for i in range(-6, 13)]
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [d * step for d in decades for step in steps if low <= d * step <= high]
        if len(ticks) <= most:
            break
    return [round(tick, 6) for tick in ticks]


def end_labels(axes: Axes, ends: Sequence[tuple[float, float, Method]], gap: float = 0.07) -> None:
    """Write names beside the ends (x, y) of lines, moved apart where they would overlap.

    gap  the least distance of two names, as a share of the height of the axes
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    places = sorted(
        (float(to_axes.transform((x, y))[1]), drawn.label, drawn)
        for x, y, drawn in ends
        if y == y
    )  # fmt: skip
    heights: list[float] = []
    for y, *_ in places:
        heights.append(max(y, heights[-1] + gap) if heights else y)
    limit = 1.02
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], limit)
        limit = heights[i] - gap
    for height, (_, label, drawn) in zip(heights, places, strict=True):
        axes.text(
            1.02, height, label, transform=axes.transAxes, va="center", color=drawn.colour,
            size=SMALL, weight="bold" if drawn.is_ours else "normal",
            parse_math=False,
        )  # fmt: skip


class Bar(NamedTuple):
    """A bar of `cut_bars`: its length, the text after it and its colour."""

    value: float
    text: str
    colour: str


def cut_bars(axes: Axes, rows: Sequence[tuple[str, Sequence[Bar]]], cut: float, unit: str) -> None:
    """Draw rows of horizontal bars from 0; one longer than `cut` is broken off."""
    limit = 1.14 * cut
    for place, (_, found) in enumerate(rows):
        height = 0.8 / len(found)
        for i, bar in enumerate(found):
            y = place + (i - (len(found) - 1) / 2) * height
            is_cut = bar.value > cut
            length = cut if is_cut else bar.value
            axes.barh(y, length, height=0.92 * height, color=bar.colour)
            if is_cut:  # two white strokes through the end show it
                for x in (0.955, 0.97):
                    ends = ([x * cut, (x + 0.01) * cut], [y + height / 2, y - height / 2])
                    axes.plot(*ends, color="white", linewidth=1.5)
            start = max(length, 0) + 0.006 * limit
            axes.text(start, y, bar.text, va="center", size=SMALL - 0.5, color=bar.colour)
    axes.set(xlim=(min(0, *(b.value for _, f in rows for b in f)), limit))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_xlabel(unit)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= cut])
    axes.xaxis.set_major_formatter(lambda value, _: plain(value))
    tidy(axes)
    axes.tick_params(axis="y", length=0)


def colour_names(drawn: Figure, names: Sequence[str]) -> None:
    """Say below the picture which colour is what."""
    from matplotlib.patches import Patch

    handles = [Patch(color=METHODS[name].colour, label=METHODS[name].label) for name in names]
    drawn.legend(
        handles=handles, loc="outside lower center", ncols=4, fontsize=SMALL, frameon=False
    )
