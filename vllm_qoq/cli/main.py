"""The command `vllm-qoq`, of which `--help` and `--version` import neither torch nor vLLM."""

from __future__ import annotations

import argparse
import sys

from vllm_qoq.cli import (
    bench,
    calibrate_kv,
    caption,
    convert_lora,
    doctor,
    evaluate,
    import_checkpoint,
    inspect,
    merge,
    perplexity,
    quantize,
    tune,
    verify,
)
from vllm_qoq.cli.output import guarded
from vllm_qoq.cli.parser import Parser, kebab_case
from vllm_qoq.cli.run import run
from vllm_qoq.version import __version__

_COMMANDS = (
    *(quantize, calibrate_kv, merge, inspect, verify, import_checkpoint, perplexity, evaluate),
    *(convert_lora, caption, tune, bench, doctor),
)


def main() -> int:
    """Parse the command line and run the command; the result is the exit code."""
    return guarded(lambda: run(_parser().parse_args(kebab_case(sys.argv[1:]))))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="vllm-qoq", description="One checkpoint, several precisions, served by vLLM."
    )
    parser.add_argument("--version", action="version", version=f"vllm-qoq {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
