"""Perplexity of every set, and what each step of QoQ adds, on one model.

    python examples/accuracy.py MODEL --text calibration.txt --heldout heldout.txt -o OUT
        [--compare NAME=CHECKPOINT ...]

The script quantizes MODEL as `vllm-qoq quantize` does, with all steps, without any, and without
each of them in turn. It measures each result in plain transformers with a 16-bit and a simulated
4-bit KV cache. `--compare` adds finished compressed-tensors checkpoints, such as llmcompressor's.
It writes OUT/accuracy.json, OUT/accuracy.md and OUT/accuracy.png.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

STEPS = (
    *("rotate", "k_mean", "kv_hadamard", "smooth_attention", "smooth_outputs"),
    *("reorder", "clip", "gptq"),
)
PLAIN = dict.fromkeys(STEPS, False)
# The sets and options of each run. The table has a row per set.
RUNS: dict[str, dict[str, Any]] = {
    "round to nearest": {"sets": ("w8a8", "w4a8"), **PLAIN},
    "QoQ": {"sets": ("w8a8", "w4a16", "w4a8")},
    "QoQ per channel": {"sets": ("w4a8",), "group_size": -1},
    **{f"QoQ without {step}": {"sets": ("w4a8",), step: False} for step in STEPS},
}
Row = dict[str, Any]


def rows_of(name: str, args: argparse.Namespace, folder: Path) -> list[Row]:
    """Quantize once and measure before and after; returns a row for the model and for each set."""
    folder.mkdir()
    from vllm_qoq.quantizer.job import run
    from vllm_qoq.quantizer.options import QuantizeOptions
    from vllm_qoq.quantizer.plan import Job

    options = QuantizeOptions.parse(
        {**RUNS[name], "samples": args.samples, "seqlen": args.seqlen}, name
    )
    job = Job(
        model=args.model,
        out=folder / "checkpoint",
        text=args.text,
        work_dir=folder / "work",
        eval_text=args.heldout,
        overwrite=True,
        quiet=True,
    )
    report = run(job, options)
    facts = {"seconds": report["seconds"], "memory_bytes": report["peak_memory_bytes"]}
    float_row = {"version": "float", "set": "", **report["before"]["perplexity"]}
    sets = report["after"].items()
    return [
        float_row,
        *({"version": name, "set": s, **found["perplexity"], **facts} for s, found in sets),
    ]


def compared(name: str, folder: str, args: argparse.Namespace) -> Row:
    """Measure a compressed-tensors checkpoint in the same way."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vllm_qoq.checkpoint.folder import Checkpoint
    from vllm_qoq.quantizer import evaluate
    from vllm_qoq.quantizer.check import SetCheck
    from vllm_qoq.quantizer.model import layer_names
    from vllm_qoq.quantizer.sets import dequantize
    from vllm_qoq.quantizer.text import pieces

    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    state, checkpoint = model.state_dict(), Checkpoint.open(folder)
    for weight in state:
        stem = weight.removesuffix("weight")
        leaves = {
            key.removeprefix(stem): checkpoint.get(key)
            for key in checkpoint.tensors
            if key.startswith(stem)
        }
        state[weight].copy_(dequantize(leaves) if "weight_scale" in leaves else leaves["weight"])
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = pieces(args.heldout, tokenizer, args.seqlen, None)
    check = SetCheck(
        tokenizer,
        windows,
        prompts=[],
        kv_bits=(16, 4),
        kv_hadamard=False,
        has_int8_head=False,
        quiet=True,
    )
    groups = checkpoint.config["quantization_config"]["config_groups"].values()
    has_int8 = any(group["input_activations"] for group in groups)
    names = layer_names({"model_type": model.config.model_type})
    with evaluate.int8_inputs(evaluate.linears(model, names) if has_int8 else ()):
        return {"version": name, "set": "", **check.measure(model, name)["perplexity"]}


def table(rows: list[Row]) -> str:
    """Write a Markdown table of perplexity and its distance from the float model's."""
    base = rows[0]["kv16"]
    lines = ["| version | set | KV16 | | KV4, simulated | |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [
            cell
            for key in ("kv16", "kv4")
            for cell in (f"{row[key]:.4f}", f"{row[key] / base - 1:+.2%}")
        ]
        lines.append(f"| {row['version']} | {row['set']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """Draw the distance from the float model, a bar for each row and KV precision."""
    from vllm_qoq import plots

    base, caches = rows[0]["kv16"], ("kv16", "kv4")

    def added(row: Row, kv: str) -> float:
        return 100 * (row[kv] / base - 1)

    bars = [
        (
            f"{row['version']} {row['set'].upper()}".rstrip(),
            [
                plots.Bar(added(row, kv), f"{added(row, kv):+.2f} %", plots.METHODS[kv].colour)
                for kv in caches
            ],
        )
        for row in rows
    ]
    chosen = [row["version"] == "QoQ" and row["set"] == "w4a8" for row in rows]
    place = chosen.index(True) if any(chosen) else len(rows) - 1
    less, more = (added(rows[place], kv) for kv in caches)
    figure = plots.figure(
        f"{bars[place][0]} adds {less:.2f} % to the perplexity, {more:.2f} % with a 4-bit KV cache",
        "Perplexity over that of the float model with a 16-bit cache; 4-bit caches simulated.",
        height=1 + 0.4 * len(rows),
    )
    largest = max(bar.value for _, found in bars for bar in found)
    plots.cut_bars(figure.subplots(), bars, min(max(largest, 1), 10), "perplexity added, %")
    plots.colour_names(figure, caches)
    plots.save(figure, path)


def save(rows: list[Row], folder: Path) -> None:
    """Write what has been measured so far."""
    for name, text in (("accuracy.json", json.dumps(rows, indent=2)), ("accuracy.md", table(rows))):
        partial = folder / f"{name}.partial"
        partial.write_text(text)
        partial.replace(folder / name)


def main() -> None:
    """Run everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--heldout", type=Path, required=True, help="text to measure on")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--compare", nargs="*", default=[], metavar="NAME=CHECKPOINT")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--only", nargs="*", metavar="RUN", help="of: " + "; ".join(RUNS))
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    compare = [item.partition("=") for item in args.compare]
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool,
    ):
        others = [pool.submit(compared, name, path, args) for name, _, path in compare]
        names = list(RUNS) if args.only is None else args.only
        folders = [Path(folder) / str(index) for index in range(len(names))]
        for found in pool.map(rows_of, names, [args] * len(names), folders):
            rows += found[bool(rows) :]
            print(table(found), file=sys.stderr, flush=True)
            save([*rows, *(other.result() for other in others if other.done())], args.output)
        rows += [other.result() for other in others]
    save(rows, args.output)
    plot(rows, args.output / "accuracy.png")
    print(table(rows))


if __name__ == "__main__":
    main()
