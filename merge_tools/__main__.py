"""`python -m merge_tools merge|inspect|verify`."""

import sys

from merge_tools.cli import add_parsers, run
from merge_tools.parser import Parser
from merge_tools.spelling import kebab_case
from vllm_qoq.output import guarded


def main() -> int:
    """Parse the command line and run the command."""
    parser = Parser(prog="merge_tools", description="Merge quantized checkpoints.")
    add_parsers(parser.add_subparsers(required=True, metavar="COMMAND"))
    return guarded(lambda: run(parser.parse_args(kebab_case(sys.argv[1:]))))


if __name__ == "__main__":
    sys.exit(main())
