"""The table of docs/hardware-and-models.md that says what ran for each class of models.

    python tests/support/model_table.py

writes it anew between its two marks. A class has a row where `quantize` knows it, and a cell says
yes because a test runs over the same list, or because a measurement is among the tracked ones.
"""

import json
from pathlib import Path

from tiny_models import MODELS

from vllm_qoq.bench.serving.shapes import SHAPES
from vllm_qoq.models.table import ARCHITECTURES, with_names

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "hardware-and-models.md"
RUNS = ROOT / "docs" / "measurements" / "data" / "throughput_h200"
BEGIN, END = "<!-- what ran, by class: begin -->\n", "<!-- what ran, by class: end -->\n"
HEAD = (
    "| Class | `quantize` | two nested sets and an 8-bit cache | two ranks and a 4-bit cache | "
    "throughput on an H200 |\n|---|---|---|---|---|\n"
)


def classes_served() -> set[str]:
    """The classes of the models that two tests of tests/serving serve on a CPU.

    They are test_architectures.py, of `make test`, and test_architecture_ranks.py, of `make
    test-slow`.
    """
    return {name.partition(",")[0] for name in MODELS}


def measured(name: str) -> list[str]:
    """The shapes of a class whose throughput is among the tracked measurements."""
    shapes = (json.loads(file.read_text())["model"] for file in sorted(RUNS.glob("*.json")))
    return [shape for shape in shapes if SHAPES[shape].architecture == name]


def table() -> str:
    """Make the table."""
    rows = []
    for name in with_names():
        names = ARCHITECTURES[name].names
        without = {"R1": names.fixed_stream, "R2": names.fixed_values}
        lost = [step for step, why in without.items() if why is not None]
        quantize = ", but ".join(("yes", *lost))
        served = "yes" if name in classes_served() else "no"
        speed = ", ".join(measured(name)) or "not run"
        rows.append(f"| `{name}` | {quantize} | {served} | {served} | {speed} |\n")
    return HEAD + "".join(rows)


def with_table(page: str) -> str:
    """Put the table between the marks of the page; ValueError where it lacks one."""
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"{PAGE.name} lacks {BEGIN!r} or {END!r}")
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
