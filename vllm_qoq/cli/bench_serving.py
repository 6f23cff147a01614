"""The command `bench serving`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_qoq.bench import BenchError
from vllm_qoq.bench.serving import cases, formats, shapes
from vllm_qoq.bench.serving.cases import Lengths
from vllm_qoq.cli import bench_online, measurement
from vllm_qoq.cli.arguments import is_positive, json_object, positive
from vllm_qoq.cli.parser import Commands, Parser

if TYPE_CHECKING:
    from vllm_qoq.bench.serving.job import CheckedJob

# The options that only batches have.
_OFFLINE = ("batches", "max_batch", "repeats")


def add_parser(benchmarks: Commands[Parser]) -> None:
    """Add the command to those of `bench`."""
    parser = benchmarks.add_parser(
        "serving", help="highest throughput of whole engines, ours and vLLM's formats side by side"
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder with an unquantized model's config.json, or one of "
        f"{', '.join(shapes.SHAPES)}; the weights are vLLM's dummies",
    )
    parser.add_argument(
        "--formats",
        type=names,
        default=formats.DEFAULT,
        metavar="NAME,...",
        help=f"WEIGHTS or with a cache behind, WEIGHTS of {', '.join(formats.WEIGHTS)}, caches "
        f"{', '.join(formats.SUFFIXES)} (default: {','.join(formats.DEFAULT)})",
    )
    parser.add_argument(
        "--checkpoint",
        type=checkpoint,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a finished checkpoint to measure as well; may be repeated",
    )
    parser.add_argument(
        "--lengths",
        type=lengths,
        default=cases.LENGTHS,
        metavar="IN/OUT,...",
        help="tokens of prompts and answers, such as 1024/512,1000/1000; one pair with --online "
        f"(default: {','.join(map(str, cases.LENGTHS))})",
    )
    parser.add_argument(
        "--batches",
        type=batches,
        default=cases.BATCHES,
        metavar="N,...",
        help=f"batch sizes; {cases.FULL} is the largest that the KV cache holds, rounded down to "
        "one with a CUDA graph: steps of 8 up to 128, of 16 up to 256, then coarser (default: "
        f"{','.join(cases.BATCHES)})",
    )
    parser.add_argument(
        "--max-batch",
        type=positive,
        default=cases.MOST,
        metavar="N",
        help=f"the largest batch that {cases.FULL} may be (default: {cases.MOST})",
    )
    parser.add_argument(
        "--repeats", type=positive, default=1, metavar="N", help="runs of a case (default: 1)"
    )
    parser.add_argument(
        "--minutes",
        type=minutes,
        metavar="N",
        help="stop after so long; the same command with --overwrite goes on",
    )
    parser.add_argument(
        "--engine-args",
        type=json_object,
        default={},
        metavar="JSON",
        help="arguments of LLM() for all engines, such as '{\"tensor_parallel_size\": 2}'",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        help="for results of a run that is stopped (default: OUT with .work behind)",
    )
    parser.add_argument(
        "--resume",
        choices=("auto", "required", "never"),
        default="auto",
        help="whether to go on with what --work-dir holds; never deletes it (default: auto)",
    )
    bench_online.add_options(parser)
    measurement.add_output_options(parser, "serving", lambda args: _serving(args, parser))


def names(text: str) -> tuple[str, ...]:
    """Parse a list of formats."""
    found = tuple(dict.fromkeys(text.split(",")))
    for name in found:
        try:
            formats.parse(name)
        except BenchError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return found


def checkpoint(text: str) -> tuple[str, Path]:
    """Parse NAME=DIR."""
    name, equals, folder = text.partition("=")
    is_name = name.replace("-", "").replace("_", "").isalnum() and name != "limits"
    if not equals or not folder or not is_name:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=DIR, with a name of letters, digits, - and _, but not limits"
        )
    return name, Path(folder)


def lengths(text: str) -> tuple[Lengths, ...]:
    """Parse pairs such as `1024/512,1000/1000`."""
    pairs = [part.split("/") for part in text.split(",")]
    if not all(len(pair) == 2 and all(map(is_positive, pair)) for pair in pairs):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of tokens in / tokens out like 1024/512"
        )
    return tuple(dict.fromkeys(Lengths(int(prompt), int(new)) for prompt, new in pairs))


def batches(text: str) -> tuple[str, ...]:
    """Parse batch sizes such as `16,256,full`."""
    parts = text.split(",")
    if not all(part == cases.FULL or is_positive(part) for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of batch sizes like 16,256,{cases.FULL}"
        )
    return tuple(dict.fromkeys(parts))


def minutes(text: str) -> float:
    """Parse a number of minutes above 0."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return found


def _serving(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from vllm_qoq.bench.serving.job import Job, check_offline

    bench_online.check_options(args, _OFFLINE, parser)
    if (work := args.work_dir) is None:
        if args.output is None:
            raise BenchError("nowhere to keep results; name a folder: -o OUT, or --work-dir DIR")
        out = args.output.resolve()
        if not out.name:
            raise BenchError(f"-o {args.output}: is no folder to make; name one")
        work = out.with_name(f"{out.name}.work")
    if args.model is None and args.formats != parser.get_default("formats"):
        raise BenchError("--formats: are formats of a MODEL; name one, or leave them out")
    job = Job(
        model=args.model,
        work_dir=work,
        formats=args.formats,
        checkpoints=tuple(args.checkpoint),
        lengths=args.lengths,
        batches=args.batches,
        most=args.max_batch,
        repeats=args.repeats,
        minutes=args.minutes,
        engine_args=args.engine_args,
        resume=args.resume,
    )
    return bench_online.measure(args, job) if args.online else _offline(args, check_offline(job))


def _offline(args: argparse.Namespace, checked: CheckedJob) -> int:
    from vllm_qoq.bench.serving.run import clean, measure

    def finish() -> measurement.Finished:
        from vllm_qoq.bench.serving import plot, report
        from vllm_qoq.bench.serving.result import to_json

        result = measure(checked, args.quiet or args.json)
        return measurement.Finished(
            to_json(result),
            report.markdown(result),
            partial(plot.save, result),
            partial(clean, checked, result),
        )

    return measurement.run(args, "serving", measurement.check_vllm, finish)
