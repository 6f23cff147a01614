"""How long a model takes to quantize, ours beside llmcompressor's, from a few blocks of its shape.

    python examples/time_quantizing.py llama-3-8b -o OUT [--blocks 2 4] [--ways nested w4a8 ...]

For each number of --blocks a random model of the shape is written and quantized in every way, each
in a process of its own, loading and saving included. A block takes the difference, and the whole
model as many of them as it has. OUT/quantizing.json and OUT/quantizing.md have the table.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_qoq.bench.serving.online.tokenizer import write_tokenizer
from vllm_qoq.bench.serving.shapes import SHAPES

HERE = Path(__file__).resolve().parent
WAYS = {
    "nested": ("--nested",),
    "w8a8,w4a8": ("--sets", "w8a8,w4a8"),
    "w4a8": ("--sets", "w4a8"),
    "llmcompressor-w4a16": ("--scheme", "w4a16"),
    "llmcompressor-w8a8": ("--scheme", "w8a8"),
}
PEER = "llmcompressor"


class Run(NamedTuple):
    """One run: the seconds of its process, and the most bytes of the GPU if it says them."""

    way: str
    blocks: int
    seconds: float
    gpu_bytes: int | None


def write_model(folder: Path, config: Mapping[str, Any], blocks: int) -> None:
    """Write a model of the shape with `blocks` blocks of random weights, and a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    document = {**config, "num_hidden_layers": blocks}
    (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        loaded = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(loaded, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    write_tokenizer(folder, document["vocab_size"])


def command(way: str, model: Path, out: Path, text: Path, samples: int, seqlen: int) -> list[str]:
    """Make the command that quantizes `model` in one way."""
    program: tuple[str, ...] = ("-m", "vllm_qoq.cli", "quantize", str(model), "-o", str(out), "-q")
    if way.startswith(PEER):
        program = (str(HERE / "quantize_llmcompressor.py"), str(model), str(out))
    cut = ("--samples", str(samples), "--seqlen", str(seqlen))
    return [sys.executable, *program, *WAYS[way], "--text", str(text), *cut]


def measure(arguments: Sequence[str], way: str, blocks: int, out: Path) -> Run:
    """Run one command, and delete what it wrote."""
    from vllm_qoq.quantizer.assemble import REPORT  # not for --help: it takes half a minute

    started = time.monotonic()
    subprocess.run(arguments, check=True, stdout=sys.stderr)
    seconds = time.monotonic() - started
    report = out / REPORT
    gpu = json.loads(report.read_text())["peak_gpu_memory_bytes"] if report.exists() else None
    shutil.rmtree(out)
    return Run(way, blocks, seconds, gpu)


def table(runs: Sequence[Run], layers: int) -> str:
    """Draw the table; the whole model is the smallest run and the blocks that it lacks."""
    lines = [
        f"| way | seconds, by blocks | a block, s | {layers} blocks, min | GPU, GiB |",
        "| --- | -----------------: | ---------: | ------------: | -------: |",
    ]
    for way in dict.fromkeys(run.way for run in runs):
        mine = sorted((run for run in runs if run.way == way), key=lambda run: run.blocks)
        first, last = mine[0], mine[-1]
        block = (last.seconds - first.seconds) / (last.blocks - first.blocks)
        whole = first.seconds + block * (layers - first.blocks)
        seconds = ", ".join(f"{run.blocks}: {run.seconds:.1f}" for run in mine)
        gpu = f"{last.gpu_bytes / 2**30:.1f}" if last.gpu_bytes else ""
        lines.append(f"| {way} | {seconds} | {block:.2f} | {whole / 60:.1f} | {gpu} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=[name for name in SHAPES if not SHAPES[name].experts])
    parser.add_argument("-o", "--output", type=Path, required=True, help="new folder")
    parser.add_argument("--blocks", type=int, nargs=2, default=(2, 4), help="(default: 2 4)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY",
                        help=f"of {', '.join(WAYS)} (default: all)")  # fmt: skip
    parser.add_argument("--samples", type=int, default=128, help="pieces of text (default: 128)")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens a piece (default: 1024)")
    args = parser.parse_args()
    few, many = args.blocks
    if not 0 < few < many:
        parser.error(f"--blocks {few} {many}: give two numbers, the smaller first")
    if args.output.exists():
        parser.error(f"-o {args.output}: exists already; choose another folder")

    shape = SHAPES[args.shape]
    work, text = args.output / "work", args.output / "text.txt"
    args.output.mkdir(parents=True)
    words = random.Random(0).choices(range(1, shape.vocabulary), k=args.samples * args.seqlen)
    text.write_text(" ".join(f"t{word}" for word in words), encoding="utf-8")
    runs: list[Run] = []
    for blocks in (few, many):
        model = args.output / f"model-{blocks}"
        write_model(model, shape.config(), blocks)
        for way in args.ways:
            line = command(way, model, work, text, args.samples, args.seqlen)
            runs.append(measure(line, way, blocks, work))
            print(f"{way}, {blocks} blocks: {runs[-1].seconds:.1f} s", file=sys.stderr, flush=True)
        shutil.rmtree(model)
    text.unlink()
    found = {"shape": args.shape, "layers": shape.layers, "runs": [run._asdict() for run in runs]}
    (args.output / "quantizing.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.output / "quantizing.md").write_text(table(runs, shape.layers))
    print(table(runs, shape.layers), end="")


if __name__ == "__main__":
    main()
