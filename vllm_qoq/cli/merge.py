"""The command `merge`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_qoq.cli import arguments
from vllm_qoq.cli.parser import Commands, Parser
from vllm_qoq.errors import printable

if TYPE_CHECKING:
    from merge_tools.job import Merged
    from vllm_qoq.routing.table import Routing

_ROUTING_BYTES = 1 << 20


def add_parser(commands: Commands[Parser]) -> None:
    """Add the command to those of the program."""
    parser = commands.add_parser("merge", help="merge finished checkpoints of one model into one")
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="NAME=DIR",
        help="a set and its checkpoint: a folder, or ORG/NAME or ORG/NAME@REVISION on the Hub",
    )
    arguments.add_output(parser)
    parser.add_argument("--prefill", metavar="NAME", help="set for prompts (default: the first)")
    parser.add_argument(
        "--decode",
        metavar="[BATCH:]NAME,...",
        help="sets for generation by batch size, e.g. 16:w4a16,w8a8 (default: the last set)",
    )
    parser.add_argument(
        "--routing",
        type=Path,
        metavar="FILE",
        help="JSON file with the whole routing table, layer rules too; instead of the two above",
    )
    parser.add_argument(
        "--nest",
        action="store_true",
        help="store the 8-bit set (or the float model) as 4 bits on top of the qoq_linear set's",
    )
    arguments.add_max_clipped(parser)
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16"),
        help="in which all sets run (default: what they say; bfloat16 where they differ)",
    )
    arguments.add_max_shard_size(parser)
    arguments.add_dry_run(parser)
    parser.add_argument("--no-model-card", action="store_true", help="write no README.md")
    arguments.add_reporting(parser, _merge)


def _merge(args: argparse.Namespace) -> int:
    from merge_tools.sources import parse_sources

    folders = parse_sources(args.sources)
    routing = _routing(args, list(folders))
    from merge_tools.job import merge

    merged = merge(
        folders,
        args.output,
        routing,
        nest=args.nest,
        max_clipped=args.max_clipped,
        dtype=args.dtype,
        max_shard_bytes=args.max_shard_size,
        model_card=not args.no_model_card,
        dry_run=args.dry_run,
        overwrite=args.overwrite,
        quiet=args.quiet or args.json,
    )
    print(_document(args, merged) if args.json else _text(args, merged))
    return 0


def _routing(args: argparse.Namespace, names: list[str]) -> Routing:
    from vllm_qoq.routing.table import Routing, RoutingError, parse_decode

    if args.routing is not None:
        if args.prefill is not None or args.decode is not None:
            raise RoutingError("--routing is the whole table; leave out --prefill and --decode")
        return _read_routing(args.routing, names)
    decode = parse_decode(args.decode if args.decode is not None else names[-1])
    routing = Routing(prefill=names[0] if args.prefill is None else args.prefill, decode=decode)
    routing.check_sets(names)
    return routing


def _read_routing(path: Path, names: list[str]) -> Routing:
    from vllm_qoq.checkpoint.folder import read_json
    from vllm_qoq.errors import UserError
    from vllm_qoq.routing.table import Routing, RoutingError

    if not path.is_file():
        raise RoutingError(f"--routing {path}: no such file; give a file with a JSON object")
    try:
        return Routing.parse(read_json(path, _ROUTING_BYTES), names)
    except UserError as error:
        raise RoutingError(f"--routing {path}: {error}") from None


def _document(args: argparse.Namespace, merged: Merged) -> str:
    plan, shares = merged.plan, merged.clipped_shares
    return arguments.json_line(
        {
            "output": str(args.output),
            "dry_run": args.dry_run,
            "bytes": {name: plan.bytes_of(name) for name in plan.sets},
            "shared_bytes": plan.bytes_of(None),
            "total_bytes": plan.total_bytes,
            "shards": list(plan.shards),
            "dropped": [f"{owner}.{tensor}" for owner, tensor, _ in merged.left_out],
            **({"dtype": plan.dtype} if plan.dtype else {}),
            "quantization_config": merged.section.to_json(),
            **({"clipped_shares": shares} if shares else {}),
        }
    )


def _text(args: argparse.Namespace, merged: Merged) -> str:
    from vllm_qoq.progress import human_bytes

    plan, shares = merged.plan, merged.clipped_shares
    verb = "would write" if args.dry_run else "wrote"
    parts = ", ".join(f"{name} {human_bytes(plan.bytes_of(name))}" for name in plan.sets)
    lines = [
        f"{verb} {args.output}: {human_bytes(plan.total_bytes)} in {len(plan.shards)} shards "
        f"({parts}, shared {human_bytes(plan.bytes_of(None))})"
    ]
    if plan.dtype and not args.dtype:
        lines.append(f"dtype: {plan.dtype}, for all sets, which name several; --dtype sets another")
    for owner, tensor, reason in merged.left_out:
        lines.append(printable(f"left out {owner}.{tensor}: {reason}"))
    if shares:
        worst = max(shares, key=shares.__getitem__)
        mean = sum(shares.values()) / len(shares)
        lines.append(f"clipped residuals: {mean:.2%} on average, {shares[worst]:.2%} in {worst}")
    lines.append(f"routing: {json.dumps(merged.section.routing.to_json())}")
    return "\n".join(lines)
