"""The command line of merge_tools: `python -m merge_tools merge|inspect|verify`."""

import sys

from vllm_qoq.cli import inspect, merge, verify
from vllm_qoq.cli.output import guarded
from vllm_qoq.cli.parser import Parser, kebab_case
from vllm_qoq.cli.run import run


def main() -> int:
    """Parse the command line and run the command; the result is the exit code."""
    parser = Parser(prog="merge_tools", description="Merge quantized checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (merge, inspect, verify):
        command.add_parser(commands)
    return guarded(lambda: run(parser.parse_args(kebab_case(sys.argv[1:]))))


if __name__ == "__main__":
    sys.exit(main())
