"""Draw all pictures of this folder from the numbers in `data`.

    python docs/measurements/draw.py [-o FOLDER]

Every CSV says on which page its numbers stand and which command measured them.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vllm_qoq import plots
from vllm_qoq.bench import attention_plot
from vllm_qoq.bench import plot as gemm_plot
from vllm_qoq.bench.attention_cases import Decode, Heads
from vllm_qoq.bench.attention_result import AttentionResult
from vllm_qoq.bench.cases import Case
from vllm_qoq.bench.evaluate import comparison_plot
from vllm_qoq.bench.evaluate.comparison import Measured
from vllm_qoq.bench.result import Result
from vllm_qoq.bench.roofline import WGMMA
from vllm_qoq.bench.serving import formats, table, table_plot
from vllm_qoq.bench.serving import plot as serving_plot

HERE = Path(__file__).resolve().parent
CARD, COPY_RATE = "NVIDIA H200", 4.29e12
MODELS = (
    *("llama-3-8b", "mistral-7b", "qwen2.5-7b", "llama-2-7b", "llama-2-13b", "llama-30b"),
    *("yi-34b", "qwen3-32b", "llama-2-70b", "llama-3.1-70b", "qwen1.5-72b"),
)
# Measured with random codes; the others' weights were zeros, or nearly.
RANDOM_CODES = ("llama-3-8b", "llama-3.1-70b")
Row = dict[str, str]


class Line(NamedTuple):
    """A format that `bench serving` measured, as its pictures take it."""

    name: str
    is_ours: bool
    format: formats.Format


def read(name: str) -> list[Row]:
    """The rows of data/NAME.csv, without its comments."""
    with (HERE / "data" / f"{name}.csv").open() as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def numbers(row: Row, *but: str) -> dict[str, float]:
    """Every column of a row but those, as numbers."""
    return {key: float(value) for key, value in row.items() if key not in but}


def throughput_h200() -> Any:
    """Tokens a second of every model, ours beside the best of vLLM's formats."""
    runs = [HERE / "data" / "throughput_h200" / f"{model}.json" for model in MODELS]
    found = table.read(runs, "1024/512")
    rows = [
        replace(row, model=f"{row.model}\n(random codes)") if row.model in RANDOM_CODES else row
        for row in found.rows
    ]
    return table_plot.figure(replace(found, rows=tuple(rows)))


def llama_3_8b() -> Any:
    """Tokens a second and the time of a step in every format, over the batch."""
    path = HERE / "data" / "throughput_h200" / "llama-3-8b.json"
    run = json.loads(path.read_text(encoding="utf-8"))
    ratio = run["speed_against_the_best_peer"]["1024/512"]
    drawn = plots.figure(
        "With W4A8, a 4-bit KV cache and an int8 lm_head Llama-3-8B generates "
        f"{plots.times(ratio)} the tokens a second of vLLM's best format",
        f"Shape of Llama-3-8B, random codes, one {CARD}; 1024 tokens in, 512 out, all requests "
        "together.\nThe ratio is of each at its best batch. A step is a token for every request.",
        height=3.6,
    )
    rates, steps = drawn.subplots(1, 2)
    names = [engine["name"] for engine in run["engines"]]
    for engine in run["engines"]:
        sizes = [case["batch"] for case in engine["cases"]]
        one = Line(engine["name"], engine["is_ours"], formats.parse(engine["name"]))
        values = [case["tokens_per_second"] for case in engine["cases"]]
        serving_plot.line(rates, sizes, values, one, names)
        values = [1e3 * case["step_seconds"] for case in engine["cases"]]
        serving_plot.line(steps, sizes, values, one, names)
    every = [case for engine in run["engines"] for case in engine["cases"]]
    for axes, title in ((rates, "Throughput"), (steps, "A step")):
        plots.sizes_axis(axes, sorted({case["batch"] for case in every}), "requests of a batch")
        plots.panel_title(axes, title)
    rates.set(ylim=(0, None), ylabel="new tokens a second")
    rates.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    plots.values_axis(steps, [1e3 * case["step_seconds"] for case in every], "ms")
    for axes in (rates, steps):
        plots.tidy(axes)
    drawn.legend(
        *rates.get_legend_handles_labels(), loc="outside lower center", ncols=3,
        fontsize=plots.SMALL, frameon=False,
    )  # fmt: skip
    return drawn


def gemm_h200() -> Any:
    """As `vllm-qoq bench gemm` draws it."""
    rows = read("gemm_h200")
    seconds: dict[Case, dict[str, float]] = {}
    for row in rows:
        for m, value in numbers(row, "layer", "n", "k", "kernel").items():
            case = Case(row["layer"], int(row["n"]), int(row["k"]), int(m))
            seconds.setdefault(case, {})[row["kernel"]] = 1e-6 * value
    result = Result(
        model="llama-3-8b",
        device=CARD,
        environment={},
        copy_rate=COPY_RATE,
        int8_rate=WGMMA,
        tokens=tuple(dict.fromkeys(case.m for case in seconds)),
        kernels=tuple(dict.fromkeys(row["kernel"] for row in rows)),
        seconds=seconds,
        left_out=(),
    )
    ratios = next(row for row in read("gemm_h200_speed") if row["pair"].startswith("best"))
    return gemm_plot.figure(result, {int(m): r for m, r in numbers(ratios, "pair").items()})


def portable_h200() -> Any:
    """The portable GEMM on a Hopper card, beside Marlin's."""
    path = HERE / "data" / "portable_h200" / "gemm.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    tokens, speeds = document["tokens"], document["speed_against_peers"]
    places = {f"at M={m}": r for m, r in zip(tokens, speeds["marlin-w4a8-int8"], strict=True)}
    rate = document["int8_operations_per_second"]
    drawn = plots.figure(
        f"The portable W4A8 GEMM is {plots.speed_range(places, 'Marlin')}",
        f"Layers of Llama-3-8B on one {CARD} that takes the path of other GPUs, without wgmma and "
        f"the copy engine.\nGroups of 128, geometric mean of the layers. mma.sync: "
        f"{rate / 1e12:.0f} TOPS.",
        height=3,
    )
    axes = drawn.subplots()
    for peer, line in {"marlin-w4a8-int8": "o-", "marlin-w4a16": "s--"}.items():
        found = plots.method(peer)
        label = f"time of {found.label} / ours"
        axes.plot(tokens, speeds[peer], line, color=found.colour, label=label, markersize=4)
    axes.axhline(1, color=plots.INK, linewidth=1)
    plots.sizes_axis(axes, tokens, "M (tokens)")
    axes.set(ylim=(0, None), yticks=[0, 0.5, 1, 1.5, 2], ylabel="speed, Marlin = 1")
    axes.grid(axis="y", alpha=0.25)
    axes.legend(fontsize=plots.SMALL, frameon=False, loc="upper left")
    plots.tidy(axes)
    return drawn


def attention_h200() -> Any:
    """As `vllm-qoq bench attention` draws it."""
    rows = read("attention_h200")
    seconds: dict[Decode, dict[str, float]] = {}
    for row in rows:
        for name, value in numbers(row, "kernel").items():
            case = Decode(*map(int, name.split("x")))
            seconds.setdefault(case, {})[row["kernel"]] = 1e-6 * value
    result = AttentionResult(
        heads=Heads(),
        device=CARD,
        environment={},
        copy_rate=COPY_RATE,
        cases=tuple(seconds),
        kernels=tuple(row["kernel"] for row in rows),
        seconds=seconds,
        write_seconds={},
        prefill_seconds={},
        left_out=(),
    )
    pairs = [row for row in read("attention_h200_speed") if row["pair"].endswith("/ qoq-kv4")]
    ratios = {case: min(float(row[str(case)]) for row in pairs) for case in seconds}
    return attention_plot.figure(result, ratios)


def accuracy(name: str, model: str) -> Any:
    """The divergence of every kind of weights from the float model, as accuracy.py draws it."""
    document = json.loads((HERE / "data" / "accuracy" / f"{name}.json").read_text(encoding="utf-8"))
    found = [Measured.read(row) for row in document["rows"]]
    return comparison_plot.figure(
        found,
        "W4A8 g128",
        {
            "llmcompressor W4A16 GPTQ": "llmcompressor's W4A16",
            "W4A8 g128, round to nearest": "rounding to nearest",
        },
        f"{model}, {document['environment']['device']}. Kullback-Leibler divergence of the next "
        "token from the float model in transformers; bars are standard errors. Further left is "
        "better.",
    )


PICTURES: dict[str, Callable[[], Any]] = {
    "throughput_h200": throughput_h200,
    "llama_3_8b": llama_3_8b,
    "gemm_h200": gemm_h200,
    "portable_h200": portable_h200,
    "attention_h200": attention_h200,
    "accuracy_smollm2_135m": lambda: accuracy("smollm2_135m", "SmolLM2-135M-Instruct"),
    "accuracy_llama_19m": lambda: accuracy("llama_19m", "Llama of 19 million parameters"),
    "accuracy_llama_19m_outliers": lambda: accuracy(
        "llama_19m_outliers", "Llama of 19 million parameters with injected outliers"
    ),
}


def main() -> None:
    """Draw everything."""
    import matplotlib

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=HERE, metavar="FOLDER")
    args = parser.parse_args()
    matplotlib.rcdefaults()  # whatever the user's own settings are
    for name, draw in PICTURES.items():
        plots.save(draw(), args.output / f"{name}.png")


if __name__ == "__main__":
    main()
