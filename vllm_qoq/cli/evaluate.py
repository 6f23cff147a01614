"""The command `evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_qoq.cli import arguments, measurement
from vllm_qoq.cli.arguments import positive
from vllm_qoq.cli.parser import Commands, Parser


def add_parser(commands: Commands[Parser]) -> None:
    """Add the command to those of the program."""
    parser = commands.add_parser(
        "evaluate", help="what quantization changes in the next token, by set and KV cache"
    )
    what = "folder of a checkpoint that vLLM serves, ours or another"
    arguments.add_checkpoint(parser, "checkpoint", what=what)
    parser.add_argument(
        "--against",
        required=True,
        metavar="MODEL",
        help="folder of the model that was quantized, or ORG/NAME or ORG/NAME@REVISION on the Hub",
    )
    parser.add_argument("--text", type=Path, required=True, help="text to score, UTF-8")
    parser.add_argument(
        "--seqlen",
        type=_at_least_four,
        default=512,
        help="tokens a window, whose second half is scored (default: 512)",
    )
    parser.add_argument(
        "--windows", type=_windows, metavar="N", help="at most so many windows (default: all)"
    )
    parser.add_argument(
        "--kv-bits",
        type=_kv_bits,
        default=(16, 8, 4),
        metavar="BITS,...",
        help="KV caches, of 16, 8, k8v4 and 4 (default: 16,8,4)",
    )
    parser.add_argument(
        "--chunk",
        type=positive,
        default=16,
        metavar="N",
        help="tokens a step where the KV cache is quantized (default: 16)",
    )
    parser.add_argument(
        "--generate",
        type=arguments.count,
        metavar="N",
        help="greedy tokens made of the first half of every window, compared with those of the "
        "float model; 0 for none (default: 32, or half a window that is shorter)",
    )
    measurement.add_output_options(parser, "evaluate", _evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    from vllm_qoq.bench.evaluate import job

    quiet = args.quiet or args.json

    def check() -> None:
        measurement.check_vllm()
        found = job.local_folders(args.checkpoint, args.against, args.text, quiet=quiet)
        args.checkpoint, args.against = found
        job.check(*found, args.text, args.seqlen, args.kv_bits, args.generate or 0)

    def work() -> measurement.Finished:
        from vllm_qoq.bench.evaluate import plot, report

        found = job.evaluate(
            args.checkpoint,
            args.against,
            args.text,
            seqlen=args.seqlen,
            windows=args.windows,
            kv_bits=args.kv_bits,
            chunk=args.chunk,
            generate=args.generate,
            quiet=quiet,
        )
        return measurement.Finished(
            found.document(), report.text(found), lambda path: plot.save(found, path)
        )

    return measurement.run(args, "evaluate", check, work)


def _windows(text: str) -> int:
    if (found := positive(text)) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: one window tells nothing of the error")
    return found


def _at_least_four(text: str) -> int:
    if (found := positive(text)) < 4:
        raise argparse.ArgumentTypeError(f"{text!r}: half of a window has to hold two tokens")
    return found


def _kv_bits(text: str) -> tuple[int | str, ...]:
    asked = text.split(",")
    known = tuple(reversed(arguments.KV_BITS))
    for bits in asked:
        if bits not in map(str, known):
            raise argparse.ArgumentTypeError(f"{bits!r} is not one of 16, 8, k8v4 and 4")
    return tuple(bits for bits in known if str(bits) in asked)
