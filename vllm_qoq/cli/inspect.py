"""The command `inspect`."""

from __future__ import annotations

import argparse

from vllm_qoq.cli import arguments
from vllm_qoq.cli.parser import Commands, Parser


def add_parser(commands: Commands[Parser]) -> None:
    """Add the command to those of the program."""
    parser = commands.add_parser("inspect", help="show sets, sizes and routing of a checkpoint")
    arguments.add_checkpoint(parser, "checkpoint")
    arguments.add_reporting(parser, _inspect)


def _inspect(args: argparse.Namespace) -> int:
    from vllm_qoq.checkpoint.inspect import inspect, table

    report = inspect(args.checkpoint, quiet=args.quiet or args.json)
    print(arguments.json_line(report) if args.json else table(report))
    return 0
