"""The command `doctor`."""

from __future__ import annotations

import argparse
import json

from vllm_qoq.cli.parser import Commands, Parser


def add_parser(commands: Commands[Parser]) -> None:
    """Add the command to those of the program."""
    parser = commands.add_parser(
        "doctor", help="versions, GPUs, which kernels run, what is missing and how to get it"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=_doctor, debug=False)


def _doctor(args: argparse.Namespace) -> int:
    from vllm_qoq.doctor.examine import examine
    from vllm_qoq.doctor.report import text

    report = examine()
    print(json.dumps(report) if args.json else text(report))
    return 1 if report["problems"] else 0
