"""Pictures: the style that all share, and those of docs/measurements with their numbers."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from vllm_qoq import plots
from vllm_qoq.bench.evaluate import comparison
from vllm_qoq.bench.evaluate.comparison import Measured
from vllm_qoq.routing.table import Routing
from vllm_qoq.tuner import plot as tune_plot
from vllm_qoq.tuner.measurements import Estimates

ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS = ROOT / "docs" / "measurements"
TABLES = sorted((MEASUREMENTS / "data").glob("*.csv"))
POWER = re.compile(r"\^|\$|\d[eE][+-]?\d|[\u2070-\u209f\u00b2\u00b3\u00b9]")


def labels(axis):
    """The texts of an axis' ticks."""
    return [tick.get_text() for tick in axis.get_ticklabels()]


# The style


@pytest.mark.parametrize(
    "value, text",
    [
        (1, "1"),
        (0.5, "0.5"),
        (0.1 + 0.2, "0.3"),
        (1024, "1024"),
        (246720.0, "246720"),
        (1e7, "1" + 7 * "0"),
    ],
)
def test_numbers_are_plain(value, text):
    assert plots.plain(value) == text


def test_ticks_are_plain_numbers_where_something_was_measured():
    axes = Figure().subplots()
    plots.sizes_axis(axes, [1, 2, 4, 8, 16, 24, 32, 64, 128, 256, 1024], "batch")
    plots.values_axis(axes, [0.3, 4000], "ms")
    assert labels(axes.xaxis) == ["1", "4", "16", "64", "256", "1024"]
    assert axes.get_xlabel() == "batch (log scale)" and axes.get_ylabel() == "ms (log scale)"
    assert labels(axes.yaxis) == ["0.3", "1", "3", "10", "30", "100", "300", "1000", "3000"]


def test_an_axis_starts_at_0_unless_the_range_is_wide():
    axes = Figure().subplots()
    plots.values_axis(axes, [3.0, float("nan"), 9.0], "ms")
    assert axes.get_ylim()[0] == 0 and axes.get_ylabel() == "ms"
    assert not [text for text in labels(axes.yaxis) if POWER.search(text)]
    plots.values_axis(axes, [0.1, 9.0], "TB/s", may_be_log=False)
    assert axes.get_ylim()[0] == 0


@pytest.mark.parametrize(
    "ratio, said",
    [(1.468, "1.47x as fast as fp8"), (0.949, "slower than fp8 (0.95x as fast)")]
    + [(ratio, "as fast as fp8 (1.00x)") for ratio in (0.996, 1, 1.004)],
)
def test_a_speed_says_who_wins(ratio, said):
    assert plots.speed(ratio, "fp8") == said


@pytest.mark.parametrize(
    "ratios, said",
    [
        ({"at 1": 1.5, "at 2": 1.2, "at 4": 0.9}, "1.50x as fast as it at 1, 0.90x at 4"),
        ({"at 1": 0.8, "at 2": 0.9}, "slower than it (0.90x as fast) at 2, 0.80x at 1"),
        ({"at 1": 1.2, "at 2": 1.201}, "1.20x as fast as it"),
    ],
)
def test_a_range_of_speeds_has_its_best_and_its_worst(ratios, said):
    assert plots.speed_range(ratios, "it") == said


def test_a_figure_has_the_width_of_a_page_and_keeps_odd_names(tmp_path):
    title = "A finding of a model $a_b with 3 % of something that takes more than one line to say"
    drawn = plots.figure(title, "where $x^ and what", height=2)
    assert drawn.get_figwidth() == plots.WIDTH and plots.title_of(drawn) == title
    assert "\n%" not in drawn.texts[0].get_text()
    plots.save(drawn, tmp_path / "a.png")


def test_every_method_can_be_told_from_the_background_and_unforeseen_ones_from_each_other():
    for found in plots.METHODS.values():
        red, green, blue = to_rgb(found.colour)
        assert 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.62, found
    names = ["w8a8", "mine", "yours"]
    mine, yours = (plots.method(name, names) for name in names[1:])
    assert mine.label == "mine" and mine.colour != yours.colour
    assert plots.method("w8a8", names) == plots.METHODS["w8a8"]


def test_names_at_the_ends_of_lines_do_not_overlap():
    axes = Figure().subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    plots.end_labels(
        axes, [(1, y, plots.Method(str(y), plots.INK)) for y in (0.98, 0.5, 0.97, 0.99)]
    )
    heights = [text.get_position()[1] for text in axes.texts]
    assert heights[0] == pytest.approx(0.5) and max(heights) <= 1.03
    assert min(b - a for a, b in pairwise(heights)) >= 0.069


def test_a_bar_beyond_the_cut_says_its_number():
    axes = Figure().subplots()
    rows = [("a", [plots.Bar(400, "+400 %", plots.INK)]), ("b", [plots.Bar(2, "+2 %", plots.INK)])]
    plots.cut_bars(axes, rows, 10, "%")
    assert [bar.get_width() for bar in axes.patches] == [10, 2] and axes.get_xlim()[0] == 0
    assert [text.get_text() for text in axes.texts] == ["+400 %", "+2 %"]


@pytest.mark.parametrize(
    "seconds, said",
    [(1e-3, "At batch 1 a is 2.00x as fast as b"), (2.5e-3, "a is slower than b (0.80x as fast)")],
)
def test_the_title_of_tune_states_the_ratio_also_when_the_chosen_set_loses(seconds, said):
    decode = {b: {"a": seconds, "b": 2e-3} for b in (1, 8)}
    outcome = SimpleNamespace(
        measured=SimpleNamespace(
            estimates=lambda: Estimates(decode, {512: decode[1]}),
            sets=("a", "b"),
            key=SimpleNamespace(device="Some GPU"),
        ),
        routing=Routing.parse({"prefill": "a", "decode": "a"}, ("a", "b")),
        folder=Path("model"),
        request=SimpleNamespace(prefer="accuracy"),
    )
    assert said in plots.title_of(tune_plot.figure(outcome))


# The pictures of docs/measurements


@pytest.fixture(scope="module")
def draw():
    """docs/measurements/draw.py as a module."""
    spec = importlib.util.spec_from_file_location("draw_measurements", MEASUREMENTS / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures(draw, tmp_path_factory):
    """A folder with all pictures, drawn coarsely, and the figures by name."""
    folder = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "DPI", 40)
        figures = {name: function() for name, function in draw.PICTURES.items()}
        for name, drawn in figures.items():
            plots.save(drawn, folder / f"{name}.png")
    return folder, figures


def page_of(table):
    """The text of the page that a CSV names."""
    name = re.search(r"^# page: (\S+)$", table.read_text(), re.MULTILINE)[1]
    places = [folder / name for folder in (MEASUREMENTS, ROOT / "examples")]
    return next(place for place in places if place.exists()).read_text()


def numbers_in(text):
    """Every number as it is written, without its sign."""
    return set(re.findall(r"(?<![\d.])\d+(?:\.\d+)?", text))


def test_the_script_makes_every_picture_that_is_there(pictures):
    drawn = {path.name for path in pictures[0].iterdir()}
    assert drawn == {path.name for path in MEASUREMENTS.glob("*.png")}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures[0].iterdir())


def test_the_same_numbers_make_the_same_picture(draw, pictures, monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "DPI", 40)
    plots.save(draw.llama_3_8b(), tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (pictures[0] / "llama_3_8b.png").read_bytes()


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.stem)
def test_every_number_of_a_table_is_on_its_page(table):
    text = table.read_text()
    assert "# command: " in text and "# card: " in text
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    cells = [cell.lstrip("+-") for row in csv.reader(lines) for cell in row]
    found = {cell for cell in cells if re.fullmatch(r"\d+(\.\d+)?", cell)}
    assert len(found) >= 8 and not found - numbers_in(page_of(table))


def test_no_picture_has_powers_and_every_ratio_in_one_is_on_its_page(pictures):
    for name, drawn in pictures[1].items():
        texts = [text.get_text() for text in drawn.findobj(Text)]
        assert not [text for text in texts if POWER.search(text)], name
        table = MEASUREMENTS / "data" / f"{name}.csv"
        own = "accuracy" if name.startswith("accuracy_") else name
        page = page_of(table) if table.exists() else (MEASUREMENTS / f"{own}.md").read_text()
        said = numbers_in(page)
        ratios = {ratio for text in texts for ratio in re.findall(r"(\d+\.\d\d)x(?!\d)", text)}
        whole = " ".join(texts).replace("\N{NO-BREAK SPACE}", " ")
        ratios |= set(re.findall(r"[+-](\d+(?:\.\d+)?) %", whole))
        ratios |= set(re.findall(r"(\d+\.\d) times", whole))
        assert ratios <= said, (name, ratios - said)


def test_every_picture_states_a_number_in_its_title(pictures):
    for name, drawn in pictures[1].items():
        assert re.search(r"\d", plots.title_of(drawn)), name


@pytest.mark.parametrize(
    "document", sorted((MEASUREMENTS / "data" / "accuracy").glob("*.json")), ids=lambda d: d.stem
)
def test_the_accuracy_page_has_the_tables_of_every_document(document):
    page = (MEASUREMENTS / "accuracy.md").read_text()
    found = [Measured.read(row) for row in json.loads(document.read_text())["rows"]]
    assert len(found) >= 8
    for text in comparison.texts(found):
        assert comparison.table(found, text) in page


@pytest.mark.parametrize(
    "script, page, tables",
    [("predict_portable", "portable_h200", 1), ("compare_llama_3_8b", "llama_3_8b", 8)],
)
def test_a_page_has_the_tables_that_its_script_prints(script, page, tables):
    command = [sys.executable, MEASUREMENTS / f"{script}.py"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    found = [part for part in printed.strip().split("\n\n") if part.startswith("|")]
    text = (MEASUREMENTS / f"{page}.md").read_text()
    assert len(found) == tables and not [table for table in found if table not in text]
