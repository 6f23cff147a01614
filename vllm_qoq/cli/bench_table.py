"""The command `bench table`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from vllm_qoq.bench.serving.cases import LENGTHS, Lengths
from vllm_qoq.cli import measurement
from vllm_qoq.cli.arguments import is_positive
from vllm_qoq.cli.parser import Commands, Parser


def add_parser(benchmarks: Commands[Parser]) -> None:
    """Add the command to those of `bench`."""
    parser = benchmarks.add_parser(
        "table", help="runs of `bench serving` of several models, in one table and picture"
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder that `bench serving -o` has written, or its serving.json",
    )
    parser.add_argument(
        "--lengths",
        type=_lengths,
        default=LENGTHS[0],
        metavar="IN/OUT",
        help=f"which lengths to compare (default: {LENGTHS[0]})",
    )
    measurement.add_output_options(parser, "table", _table)


def _lengths(text: str) -> Lengths:
    prompt, _, new = text.partition("/")
    if not (is_positive(prompt) and is_positive(new)):
        raise argparse.ArgumentTypeError(f"{text!r} is not tokens in / tokens out like 1024/512")
    return Lengths(int(prompt), int(new))


def _table(args: argparse.Namespace) -> int:
    def work() -> measurement.Finished:
        from vllm_qoq.bench.serving import table, table_plot

        found = table.read(args.runs, str(args.lengths))
        return measurement.Finished(
            table.to_json(found), table.markdown(found), partial(table_plot.save, found)
        )

    return measurement.run(args, "table", lambda: None, work)
