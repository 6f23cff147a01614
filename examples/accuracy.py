"""What every precision loses, ours beside llmcompressor's: one table, from a model in bf16 or fp16.

    python examples/accuracy.py MODEL --text calibration.txt --heldout code.txt prose.txt -o OUT

The script quantizes MODEL in every way, ours by `vllm-qoq quantize` and the others by
quantize_llmcompressor.py, and compares the next token of each with that of MODEL, as
`vllm-qoq evaluate` does, with every precision of the KV cache. It writes OUT/accuracy.json,
OUT/accuracy.md and OUT/accuracy.png after each step. The same command goes on where it was
stopped; `--only` and `--kv-bits` choose what is measured now, beside what is there already.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from vllm_qoq import plots
from vllm_qoq.bench.evaluate import comparison, comparison_plot, job
from vllm_qoq.bench.evaluate.comparison import Measured
from vllm_qoq.bench.evaluate.scores import combine
from vllm_qoq.bench.evaluate.windows import Windows
from vllm_qoq.checkpoint.kv_config import Bits, short_name
from vllm_qoq.cli.arguments import count, positive
from vllm_qoq.errors import UserError
from vllm_qoq.text_file import check_text

HERE = Path(__file__).resolve().parent
STEPS = (
    *("rotate", "k-mean", "kv-hadamard", "smooth-attention", "smooth-outputs"),
    *("reorder", "clip", "gptq"),
)
OURS, GPTQ, ROUNDED = "W4A8 g128", "llmcompressor W4A16 GPTQ", "W4A8 g128, round to nearest"
PEERS = {GPTQ: "llmcompressor's W4A16", ROUNDED: "rounding to nearest"}


class Version(NamedTuple):
    """A way to quantize the model.

    rows     set of the checkpoint -> name of its row; the set is None where there are none
    options  of `vllm-qoq quantize`, or of quantize_llmcompressor.py
    """

    rows: dict[str | None, str]
    options: tuple[str, ...] = ()
    is_ours: bool = True


BOTH = ("--sets", "w8a8,w4a8")
VERSIONS = {
    "float": Version({None: "float model"}),
    "g128": Version({"w8a8": "W8A8", "w4a8": OURS}, BOTH),
    "round-to-nearest": Version(
        {"w8a8": "W8A8, round to nearest", "w4a8": ROUNDED},
        (*BOTH, *(f"--no-{step}" for step in STEPS)),
    ),
    "llmcompressor-w4a16": Version({None: GPTQ}, ("--scheme", "w4a16"), is_ours=False),
    "w4a16": Version({"w4a16": "W4A16"}, ("--sets", "w4a16")),
    "llmcompressor-w8a8": Version(
        {None: "llmcompressor W8A8"}, ("--scheme", "w8a8"), is_ours=False
    ),
    "g64": Version({"w4a8": "W4A8 g64"}, ("--sets", "w4a8", "--group-size", "64")),
    "nested": Version({"w8a8": "W8A8, nested"}, ("--nested",)),
    "g32": Version({"w4a8": "W4A8 g32"}, ("--sets", "w4a8", "--group-size", "32")),
    "channel": Version({"w4a8": "W4A8 per channel"}, ("--sets", "w4a8", "--group-size", "-1")),
    "llmcompressor-awq": Version(
        {None: "llmcompressor W4A16 AWQ"}, ("--scheme", "w4a16-awq"), is_ours=False
    ),
    "fast": Version(
        {"w8a8": "W8A8, effort fast", "w4a8": "W4A8 g128, effort fast"},
        (*BOTH, "--effort", "fast"),
    ),
}
ABLATIONS = {
    f"without-{step}": Version(
        {"w4a8": f"{OURS} without {step}"}, ("--sets", "w4a8", f"--no-{step}")
    )
    for step in STEPS
}
KNOWN = VERSIONS | ABLATIONS
# The rows of the table, in this order.
ORDER = (
    *("float model", "W8A8", "W8A8, effort fast", "W8A8, nested", "W8A8, round to nearest"),
    *("llmcompressor W8A8", "W4A16", GPTQ, "llmcompressor W4A16 AWQ"),
    *("W4A8 g32", "W4A8 g64", OURS, "W4A8 g128, effort fast", "W4A8 per channel"),
    *(row for ablation in ABLATIONS.values() for row in ablation.rows.values()),
    ROUNDED,
)
SETTINGS = (
    *("model", "text", "heldout", "samples", "seqlen", "windows", "chunk", "generate"),
    *("group_size", "dequantized"),
)


def commands(name: str, args: argparse.Namespace) -> dict[Path, list[str]]:
    """List the commands that make a version, each by the folder that it makes, in their order."""
    if name == "float":
        return {}
    made, folder = KNOWN[name], args.output / "checkpoints" / name
    calibration = ["--text", str(args.text), "--samples", str(args.samples)]
    calibration += ["--seqlen", str(args.seqlen)]
    groups = ["--group-size", str(args.group_size)] if "w4a16" in name else []
    rounded = folder.with_name(f"{name}-rounded") if name in args.dequantized else folder
    out = partial(rounded)
    if made.is_ours:
        quantize = ["-m", "vllm_qoq.cli", "quantize", str(args.model), "-o", str(out), "--quiet"]
    else:
        quantize = [str(HERE / "quantize_llmcompressor.py"), str(args.model), str(out)]
        groups = [] if name.endswith("w8a8") else ["--group-size", str(args.group_size)]
    found = {rounded: [*quantize, *calibration, *made.options, *groups]}
    if rounded != folder:
        script = str(HERE / "dequantize.py")
        found[folder] = [script, str(rounded), str(partial(folder))]
    return found


def partial(folder: Path) -> Path:
    """Name the folder in which another is made."""
    return folder.with_name(f"{folder.name}.partial")


def make(name: str, args: argparse.Namespace) -> Path:
    """Quantize the model in one way, where that is still to do; returns the checkpoint's folder."""
    folder = args.model
    for folder, command in commands(name, args).items():
        if folder.exists():
            continue
        log = args.output / "logs" / f"{folder.name}.log"
        unfinished = partial(folder)
        if unfinished.exists():
            shutil.rmtree(unfinished)
        begin = time.monotonic()
        with log.open("w") as file:
            done = subprocess.run([sys.executable, *command], stdout=file, stderr=file)
        if done.returncode != 0:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"{name}: {' '.join(last)}; {log} says more")
        unfinished.rename(folder)
        say(f"made {folder.name} in {time.monotonic() - begin:.0f} s")
    return folder


def measure(name: str, folder: Path, bits: Bits, args: argparse.Namespace) -> list[Measured]:
    """Score all held-out texts in one engine."""
    cuts = [
        job.cut_windows(folder, args.model, text, args.seqlen, args.windows)
        for text in args.heldout
    ]
    together = Windows(tuple(window for cut in cuts for window in cut.tokens))
    rows = KNOWN[name].rows
    is_set = bool(job.sets_of(folder)[0])
    sets = tuple(s for s in rows if s is not None) if is_set else ()
    label = f"{name}, {short_name(bits).upper()}"
    found = job.run_task(
        job.Task(
            *(folder, sets, args.model, together, bits, args.chunk, args.generate, label),
            quiet=True,
        )
    )
    scored = []
    for set_name, row in rows.items():
        scores = iter(found[set_name if is_set else None])
        for text, cut in zip(args.heldout, cuts, strict=True):
            part = [next(scores) for _ in cut.tokens]
            scored.append(Measured(row, bits, text.stem, combine(part)))
    return scored


def measured(output: Path) -> list[Measured]:
    """Read all that has been measured so far, in the order of the table."""
    rows = [
        Measured.read(document)
        for path in sorted((output / "rows").glob("*.json"))
        for document in json.loads(path.read_text(encoding="utf-8"))
    ]
    caches = comparison.KV_BITS
    return sorted(rows, key=lambda row: (ORDER.index(row.name), caches.index(row.kv_bits)))


def save(args: argparse.Namespace) -> None:
    """Write the document, the table and the picture of what has been measured so far."""
    rows = measured(args.output)
    if not rows:
        return
    document = {
        "command": " ".join(["python", "examples/accuracy.py", *sys.argv[1:]]),
        "settings": settings(args),
        "environment": environment(),
        "rows": [row.document() for row in rows],
    }
    write(args.output / "accuracy.json", json.dumps(document, indent=1))
    tables = [f"## {text}\n\n{comparison.table(rows, text)}" for text in comparison.texts(rows)]
    write(args.output / "accuracy.md", "\n".join(tables))
    subtitle = (
        f"Kullback-Leibler divergence of the next token from {args.model.name} in transformers. "
        "Bars are standard errors; further left is better."
    )
    plots.save(comparison_plot.figure(rows, OURS, PEERS, subtitle), args.output / "accuracy.png")


def write(path: Path, text: str) -> None:
    """Write a file whole."""
    partial(path).write_text(text, encoding="utf-8")
    partial(path).replace(path)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Name what all rows of a table have to have in common."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {name: plain(getattr(args, name)) for name in SETTINGS}


def environment() -> dict[str, str]:
    """Name the device and the packages that the numbers depend on."""
    import torch

    found = {"device": "CPU", "python": platform.python_version()}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    for package in ("torch", "vllm", "transformers", "llmcompressor", "compressed-tensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def check(args: argparse.Namespace) -> None:
    """Raise UserError before work begins; OUT has to be a new folder or one of these settings."""
    if args.windows == 1:
        raise UserError("--windows 1: one window tells nothing of the error; give 2 or more")
    check_text("--text", args.text)
    if (size := args.text.stat().st_size) < args.seqlen:  # no token is shorter than a byte
        raise UserError(
            f"--text {args.text}: {size} bytes, fewer than one piece of {args.seqlen} tokens; give "
            "a longer text or a smaller --seqlen"
        )
    for text in args.heldout:
        job.check(args.model, args.model, text, args.seqlen, (16,), args.generate)
    stems = [text.stem for text in args.heldout]
    if len(set(stems)) < len(stems):
        raise UserError(f"--heldout: two texts are named {stems[0]}; rename one")
    path = args.output / "settings.json"
    is_new = not args.output.exists() or (args.output.is_dir() and not any(args.output.iterdir()))
    if not is_new and not path.exists():
        raise UserError(f"-o {args.output}: holds something else; name a new folder")
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings(args):
        raise UserError(
            f"-o {args.output}: holds rows that were made with other options, {path}; name a new "
            "folder or give the same options"
        )
    for name in ("checkpoints", "logs", "rows"):
        (args.output / name).mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(settings(args), indent=1))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder")
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--heldout", type=Path, nargs="+", required=True, help="texts to score")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    parser.add_argument("--samples", type=positive, default=128, help="pieces of calibration text")
    parser.add_argument("--seqlen", type=positive, default=512, help="tokens a piece and a window")
    parser.add_argument(
        "--windows", type=positive, help="at most so many of each text (default: all)"
    )
    parser.add_argument("--chunk", type=positive, default=16, help="as of evaluate (default: 16)")
    parser.add_argument("--generate", type=count, default=32, help="as of evaluate (default: 32)")
    parser.add_argument(
        "--group-size", type=int, default=128, choices=[128, 64, 32], help="of W4A16 (default: 128)"
    )
    parser.add_argument(
        "--kv-bits", nargs="+", default=["16", "8", "k8v4", "4"],
        choices=["16", "8", "k8v4", "4"],
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", default=list(VERSIONS), choices=KNOWN, metavar="VERSION",
        help=f"of {', '.join(VERSIONS)} (default: all of these), {', '.join(ABLATIONS)}",
    )  # fmt: skip
    parser.add_argument(
        "--dequantized", nargs="*", default=[],
        choices=[name for name in VERSIONS if "w4a16" in name or not KNOWN[name].is_ours],
        help="to score as ordinary models with the rounded weights, where vLLM has no kernel",
    )  # fmt: skip
    return parser.parse_args(arguments)


def main() -> None:
    """Quantize, score and write, going on after what fails."""
    args = parse()
    failed = []
    try:
        check(args)
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    for name in args.only:
        try:
            folder = make(name, args)
            for kv in args.kv_bits:
                bits: Any = int(kv) if kv.isdigit() else kv
                path = args.output / "rows" / f"{name}-{short_name(bits)}.json"
                is_served_by_others = not KNOWN[name].is_ours and name not in args.dequantized
                if path.exists() or (is_served_by_others and bits != 16):
                    continue
                begin = time.monotonic()
                rows = [row.document() for row in measure(name, folder, bits, args)]
                write(path, json.dumps(rows, indent=1))
                say(f"scored {name} with {short_name(bits)} in {time.monotonic() - begin:.0f} s")
                save(args)
        except UserError as error:
            say(f"failed: {error}")
            failed.append(name)
    save(args)
    if failed:
        raise SystemExit(f"error: missing in the table: {', '.join(failed)}")
    print((args.output / "accuracy.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)
