"""The command `convert-lora`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from vllm_qoq.cli import arguments
from vllm_qoq.cli.parser import Commands, Parser


def add_parser(commands: Commands[Parser]) -> None:
    """Add the command to those of the program."""
    parser = commands.add_parser(
        "convert-lora", help="convert a LoRA adapter of a model for its quantized checkpoint"
    )
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        type=Path,
        help="folder of PEFT, with adapter_config.json and adapter_model.safetensors",
    )
    what = "folder that quantize made of the model"
    arguments.add_checkpoint(parser, "checkpoint", "CHECKPOINT", what)
    arguments.add_output(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT once done")
    arguments.add_reporting(parser, _convert_lora)


def _convert_lora(args: argparse.Namespace) -> int:
    from vllm_qoq.lora.job import convert_lora

    found = convert_lora(
        args.adapter,
        args.checkpoint,
        args.output,
        overwrite=args.overwrite,
        quiet=args.quiet or args.json,
    )
    if args.json:
        print(json.dumps({**asdict(found), "output": str(found.output)}))
    else:
        print(
            f"wrote {found.output}: {len(found.layers)} layers; serve it with --enable-lora "
            f"--max-lora-rank {found.max_lora_rank} and "
            """--additional-config '{"qoq": {"lora": "converted"}}'"""
        )
    return 0
