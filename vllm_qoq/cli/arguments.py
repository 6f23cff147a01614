"""Arguments that several commands share: options, their types, and JSON for stdout."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_qoq.numerics import MAX_CLIPPED

KV_BITS = (4, "k8v4", 8, 16)
"""What `--kv-bits` takes, smaller caches first (`vllm_qoq.checkpoint.kv_config.Bits`)."""
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_checkpoint(
    parser: argparse.ArgumentParser, name: str, metavar: str | None = None, what: str = "folder"
) -> None:
    """Add the argument `name`: `what`, a folder, or an id of the Hugging Face Hub.

    It stays text, because a path forgets the `./` that tells `./ORG/NAME` from an id.
    """
    parser.add_argument(
        name, metavar=metavar, help=f"{what}, or ORG/NAME or ORG/NAME@REVISION on the Hub"
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add `-o OUT`, the folder that a command makes, to a parser."""
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="folder to make"
    )


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Add `--dry-run` and `--overwrite`, for a command that makes a folder."""
    parser.add_argument("--dry-run", action="store_true", help="check and show the plan, then stop")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT once done")


def add_max_clipped(parser: argparse.ArgumentParser) -> None:
    """Add `--max-clipped SHARE`, for a command that can nest a set."""
    parser.add_argument(
        "--max-clipped",
        default=MAX_CLIPPED,
        type=share,
        metavar="SHARE",
        help=f"of a layer's weights that nesting may clip (default: {MAX_CLIPPED})",
    )


def add_max_shard_size(parser: argparse.ArgumentParser) -> None:
    """Add `--max-shard-size SIZE`, for a command that writes weights."""
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        type=size,
        metavar="SIZE",
        help="of a file with weights, for example 500MB (default: 5GB)",
    )


def add_reporting(
    parser: argparse.ArgumentParser, handler: Callable[[argparse.Namespace], int]
) -> None:
    """Add `--json`, `--quiet` and `--debug`, and the function that runs the command."""
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=handler)


def json_line(report: dict[str, Any]) -> str:
    """Format a report as JSON, with null for NaN and infinity, which a config.json may hold."""
    return json.dumps(json.loads(json.dumps(report), parse_constant=lambda _: None))


def size(text: str) -> int:
    """Parse `5GB` as 5000000000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)", text.strip().upper())
    if match is None or not 0 < float(match[1]) < 1e15:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def share(text: str) -> float:
    """Parse a number from 0 to 1."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return found


def share_above_zero(text: str) -> float:
    """Parse a number above 0 and at most 1."""
    if not (found := share(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share above 0")
    return found


def kv_bits(text: str) -> int | str:
    """Read one of KV_BITS, or what is none of them."""
    return int(text) if text.isdecimal() else text


def positive(text: str) -> int:
    """Parse a whole number above 0, of at most 9 digits."""
    if not is_positive(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def count(text: str) -> int:
    """Parse a whole number from 0 on, of at most 9 digits."""
    if text != "0" and not is_positive(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return int(text)


def is_positive(text: str) -> bool:
    """Whether `positive` takes the text."""
    return text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a JSON object like '{{\"enforce_eager\": true}}'"
        )
    return found


def at_least_two(text: str) -> int:
    """Parse the number of tokens of a window, at least 2."""
    if (found := positive(text)) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: a window scores all tokens but its first")
    return found
