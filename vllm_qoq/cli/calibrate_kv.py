"""The command `calibrate-kv`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_qoq.cli import arguments
from vllm_qoq.cli.output import stdout_for
from vllm_qoq.cli.parser import Commands, Parser

if TYPE_CHECKING:
    from vllm_qoq.quantizer.calibrate_kv import Calibrated


def add_parser(commands: Commands[Parser]) -> None:
    """Add the command to those of the program."""
    parser = commands.add_parser(
        "calibrate-kv",
        help="copy a model with the mean of K, which a quantized KV cache leaves out",
    )
    what = "folder of a model in floating point, or of a checkpoint of ours"
    arguments.add_checkpoint(parser, "model", "MODEL", what)
    arguments.add_output(parser)
    parser.add_argument("--text", type=Path, required=True, help="calibration text, UTF-8")
    parser.add_argument(
        "--kv-bits",
        type=arguments.kv_bits,
        choices=[bits for bits in arguments.KV_BITS if bits != 16],
        help="KV cache that OUT is served with (default: what MODEL says, else 4)",
    )
    parser.add_argument(
        "--kv-hadamard",
        action=argparse.BooleanOptionalAction,
        help="rotate K in the KV cache (default: what MODEL says, else where heads have a power of "
        "two of channels)",
    )
    parser.add_argument(
        "--samples", type=arguments.positive, default=128, help="pieces of text (default: 128)"
    )
    parser.add_argument(
        "--seqlen", type=arguments.at_least_two, default=1024, help="tokens a piece (default: 1024)"
    )
    arguments.add_max_shard_size(parser)
    arguments.add_dry_run(parser)
    arguments.add_reporting(parser, _calibrate_kv)


def _calibrate_kv(args: argparse.Namespace) -> int:
    from vllm_qoq.quantizer.calibrate_kv import calibrate_kv, local_model, open_source

    quiet = args.quiet or args.json
    folder = local_model(args.model, args.output, args.text, overwrite=args.overwrite, quiet=quiet)
    open_source(folder)  # before the imports, which take seconds
    with stdout_for(sys.stderr.fileno()) as out:  # llmcompressor logs there
        from vllm_qoq.quantizer import noise

        noise.hide_bars(owns_process=True)
        found = calibrate_kv(
            folder,
            args.output,
            args.text,
            kv_bits=args.kv_bits,
            kv_hadamard=args.kv_hadamard,
            samples=args.samples,
            seqlen=args.seqlen,
            max_shard_bytes=args.max_shard_size,
            dry_run=args.dry_run,
            overwrite=args.overwrite,
            quiet=quiet,
        )
        print(_document(found, args.dry_run) if args.json else _text(found, args.dry_run), file=out)
    return 0


def _document(found: Calibrated, dry_run: bool) -> str:
    return json.dumps(
        {
            "output": str(found.output),
            "dry_run": dry_run,
            "kv_cache": found.kv_cache.to_json(),
            "layers": found.layers,
            "samples": found.samples,
            "seqlen": found.seqlen,
            "total_bytes": found.total_bytes,
            "large_key_biases": list(found.large_biases),
        }
    )


def _text(found: Calibrated, dry_run: bool) -> str:
    from vllm_qoq.progress import human_bytes

    rotated = ", keys rotated" if found.kv_cache.hadamard else ""
    return (
        f"{'would write' if dry_run else 'wrote'} {found.output}: "
        f"{human_bytes(found.total_bytes)}, means of K of {found.layers} layers from "
        f"{found.samples} pieces of {found.seqlen} tokens, KV cache: "
        f"{found.kv_cache.all_bits()}{rotated}"
    )
