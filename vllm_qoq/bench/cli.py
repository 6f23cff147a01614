"""The command `bench gemm`: arguments, checks, output. Handlers import torch, `--help` does not."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_qoq.bench import BenchError
from vllm_qoq.bench.cases import KERNELS, OURS, SHAPES, TIMED_TOKENS
from vllm_qoq.output import stdout_for

if TYPE_CHECKING:
    from vllm_qoq.bench.result import Result

_HOPPER = (9, 0)


def add_parser(commands: Any) -> None:
    """Add the command to the result of `ArgumentParser.add_subparsers`."""
    bench = commands.add_parser("bench", help="our kernels beside what vLLM offers")
    benchmarks = bench.add_subparsers(required=True, metavar="BENCHMARK")
    gemm = benchmarks.add_parser(
        "gemm", help="the W4A8 GEMM beside cuBLAS, CUTLASS, Marlin, Machete and humming"
    )
    gemm.add_argument(
        "--model",
        choices=tuple(SHAPES),
        default="llama-3-8b",
        help="whose layers (default: llama-3-8b)",
    )
    gemm.add_argument(
        "--tokens",
        type=tokens,
        default=TIMED_TOKENS,
        metavar="M,...",
        help=f"numbers of tokens (default: {','.join(map(str, TIMED_TOKENS))})",
    )
    gemm.add_argument(
        "--kernels",
        type=kernels,
        default=KERNELS,
        metavar="NAME,...",
        help=f"of {', '.join(KERNELS)} (default: all)",
    )
    gemm.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="folder for gemm.json, gemm.md and gemm.png",
    )
    gemm.add_argument("--overwrite", action="store_true", help="replace OUT once done")
    gemm.add_argument("--json", action="store_true", help="one JSON document on stdout")
    gemm.add_argument("-q", "--quiet", action="store_true", help="no progress")
    gemm.add_argument("--debug", action="store_true", help="show tracebacks")
    gemm.set_defaults(run=_gemm)


def tokens(text: str) -> tuple[int, ...]:
    """`64,1` -> (1, 64); for `argparse`."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers like 1,16")
    return tuple(sorted(set(map(int, parts))))


def kernels(text: str) -> tuple[str, ...]:
    """`cutlass-int8,qoq-g128` -> both, in our order; for `argparse`."""
    asked = text.split(",")
    for name in asked:
        if name not in KERNELS:
            known = ", ".join(KERNELS)
            raise argparse.ArgumentTypeError(f"{name!r} is not a kernel; choose from {known}")
    return tuple(name for name in KERNELS if name in asked)


def _gemm(args: argparse.Namespace) -> int:
    if args.output is not None:
        _check_output(args.output, args.overwrite)
    with stdout_for(sys.stderr.fileno()) as out:  # vLLM and humming print
        _check_gpu(args.kernels)
        from vllm_qoq.bench import report
        from vllm_qoq.bench.measure import measure
        from vllm_qoq.bench.result import to_json

        result = measure(args.model, args.tokens, args.kernels, args.quiet or args.json)
        text = json.dumps(to_json(result)) if args.json else report.markdown(result)
        print(text, file=out, flush=True)  # first: a full disk should not cost the run
        if args.output is not None:
            write(result, args.output, args.overwrite)
            if not args.json:
                print(f"wrote {args.output}", file=out)
    return 0


def write(result: Result, output: Path, overwrite: bool) -> None:
    """gemm.json, gemm.md and gemm.png in the folder `output`, all or none."""
    from merge_tools.execute import replacing
    from vllm_qoq.bench import plot, report
    from vllm_qoq.bench.result import to_json

    with replacing(output, overwrite) as folder:
        (folder / "gemm.json").write_text(json.dumps(to_json(result), indent=1) + "\n")
        (folder / "gemm.md").write_text(report.markdown(result))
        plot.save(result, folder / "gemm.png")


def _check_output(output: Path, overwrite: bool) -> None:
    from merge_tools.preflight import check_output

    check_output(output, (), overwrite)
    if find_spec("matplotlib") is None:
        raise BenchError(
            "matplotlib, which -o draws gemm.png with, is not installed; pip install matplotlib, "
            "or leave out -o: --json prints all numbers"
        )


def _check_gpu(names: Sequence[str]) -> None:
    import torch

    from vllm_qoq import ops

    if not torch.cuda.is_available():
        raise BenchError(
            "torch finds no NVIDIA GPU to measure on; `vllm-qoq env` shows what is here"
        )
    if not any(name in OURS for name in names):
        return
    others = ",".join(name for name in KERNELS if name not in OURS)
    if not ops.has_kernels("cuda"):
        raise BenchError(
            "this build has no CUDA kernels; build them from a clone: VLLM_QOQ_CUDA=1 pip install "
            f"--no-build-isolation . (or measure the peers alone: --kernels {others})"
        )
    if (found := torch.cuda.get_device_capability()) != _HOPPER:
        raise BenchError(
            f"our kernels are for Hopper, compute capability 9.0; {torch.cuda.get_device_name()} "
            f"has {found[0]}.{found[1]} (measure the peers alone: --kernels {others})"
        )
