"""The common part of commands that measure: options, checks before work begins, output."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_qoq.bench import BenchError
from vllm_qoq.cli.arguments import add_reporting
from vllm_qoq.cli.output import stdout_for


@dataclass(frozen=True)
class Finished:
    """A finished run: its document for --json, its report, and a function that draws its plot.

    clean  deletes what the run has kept, once the output is written
    """

    document: dict[str, Any]
    report: str
    plot: Callable[[Path], None]
    clean: Callable[[], None] = lambda: None


def add_options(
    parser: argparse.ArgumentParser,
    name: str,
    known: Iterable[str],
    handler: Callable[[argparse.Namespace], int],
) -> None:
    """Add the options that every benchmark has; NAME.json, NAME.md and NAME.png are its files."""
    known = tuple(known)
    parser.add_argument(
        "--kernels",
        type=kernels_of(known),
        default=known,
        metavar="NAME,...",
        help=f"of {', '.join(known)} (default: all)",
    )
    add_output_options(parser, name, handler)


def add_output_options(
    parser: argparse.ArgumentParser, name: str, handler: Callable[[argparse.Namespace], int]
) -> None:
    """Add the options for where the result goes, and for what is said meanwhile."""
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help=f"folder for {name}.json, {name}.md and {name}.png",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT once done")
    add_reporting(parser, handler)


def kernels_of(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Make a parser of lists of kernels for argparse: `second,first` gives both as in `known`."""

    def kernels(text: str) -> tuple[str, ...]:
        asked = text.split(",")
        for name in asked:
            if name not in known:
                names = ", ".join(known)
                raise argparse.ArgumentTypeError(f"{name!r} is not a kernel; choose from {names}")
        return tuple(name for name in known if name in asked)

    return kernels


def run(
    args: argparse.Namespace,
    name: str,
    check: Callable[[], None],
    work: Callable[[], Finished],
) -> int:
    """Check output and machine, work, print the result and write it; returns the exit code."""
    if args.output is not None:
        _check_output(args.output, args.overwrite, name)
    with stdout_for(sys.stderr.fileno()) as out:  # because vLLM and humming print
        check()
        finished = work()
        text = json.dumps(finished.document) if args.json else finished.report
        print(text, file=out, flush=True)  # first: a full disk should not cost the run
        if args.output is not None:
            _write(finished, name, args.output, args.overwrite)
            finished.clean()
            if not args.json:
                print(f"wrote {args.output}", file=out)
    return 0


def check_gpu(
    names: Iterable[str],
    ours: Container[str],
    known: Iterable[str],
) -> None:
    """Raise BenchError unless there is a GPU, and our kernels if they are among `names`."""
    import torch

    from vllm_qoq import ops

    if not torch.cuda.is_available():
        raise BenchError("torch finds no NVIDIA GPU to measure on; `vllm-qoq doctor` says why")
    if not any(name in ours for name in names):
        return
    others = ",".join(name for name in known if name not in ours)
    if not ops.has_kernels("cuda"):
        raise BenchError(
            f"{ops.missing_kernels()} (or measure the peers alone: --kernels {others})"
        )


def check_vllm() -> None:
    """Raise BenchError unless vLLM is installed."""
    if find_spec("vllm") is None:
        raise BenchError("vLLM is not installed; install it: pip install 'vllm-qoq[vllm]'")


def _write(finished: Finished, name: str, output: Path, overwrite: bool) -> None:
    """Write the three files into the folder `output`, all or none."""
    from vllm_qoq.checkpoint.replace import replacing

    with replacing(output, overwrite, _foreign(name)) as folder:
        (folder / f"{name}.json").write_text(json.dumps(finished.document, indent=1) + "\n")
        (folder / f"{name}.md").write_text(finished.report)
        finished.plot(folder / f"{name}.png")


def _foreign(name: str) -> Callable[[Path], str | None]:
    """Make a check of a folder: it names what `bench name` did not write and would be deleted."""

    def find(folder: Path) -> str | None:
        results = {f"{name}.{kind}" for kind in ("json", "md", "png")} | {".vllm-qoq-lock"}
        others = sorted(item.name for item in folder.iterdir() if item.name not in results)
        return f"holds {others[0]}, which is no result of this benchmark" if others else None

    return find


def _check_output(output: Path, overwrite: bool, name: str) -> None:
    from vllm_qoq.checkpoint.output import check_output

    check_output(output, (), overwrite, _foreign(name))
    if find_spec("matplotlib") is None:
        raise BenchError(
            f"matplotlib, which -o draws {name}.png with, is not installed; install it: pip "
            "install 'vllm-qoq[plots]', or leave out -o: --json prints all numbers"
        )
