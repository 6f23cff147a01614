"""The command `env`."""

from __future__ import annotations

import argparse
import json

from vllm_qoq.cli.parser import Commands, Parser


def add_parser(commands: Commands[Parser]) -> None:
    """Add the command to those of the program."""
    parser = commands.add_parser("env", help="versions, GPUs and plugin, for a bug report")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=_env, debug=False)


def _env(args: argparse.Namespace) -> int:
    from vllm_qoq.environment import describe, table

    report = describe()
    print(json.dumps(report) if args.json else table(report))
    return 0
