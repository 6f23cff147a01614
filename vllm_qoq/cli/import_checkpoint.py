"""The command `import`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from vllm_qoq.cli import arguments
from vllm_qoq.cli.parser import Commands, Parser

if TYPE_CHECKING:
    from vllm_qoq.importer.job import Imported

_FORMATS = {
    **{kind: f"QoQ {kind}" for kind in ("g128", "g64", "g32")},
    "channel": "QoQ per channel",
    "w8a8": "W8A8",
}


def add_parser(commands: Commands[Parser]) -> None:
    """Add the command to those of the program."""
    parser = commands.add_parser(
        "import", help="read a checkpoint of QServe or deepcompressor into ours"
    )
    arguments.add_checkpoint(parser, "source", "SRC", "folder with the weights")
    arguments.add_output(parser)
    parser.add_argument(
        "--base",
        required=True,
        metavar="MODEL",
        help="folder with config.json and tokenizer of the model that was quantized, or ORG/NAME "
        "or ORG/NAME@REVISION on the Hub",
    )
    parser.add_argument(
        "--kv-bits",
        type=arguments.kv_bits,
        choices=arguments.KV_BITS,
        help="what K and V were prepared for (default: 4 for QoQ, 16 for W8A8)",
    )
    parser.add_argument(
        "--s2-order",
        choices=("qserve", "deepcompressor"),
        help="who packed a checkpoint with groups, where its numbers do not show it "
        "(default: qserve)",
    )
    arguments.add_dry_run(parser)
    arguments.add_reporting(parser, _import)


def _import(args: argparse.Namespace) -> int:
    from vllm_qoq.importer.inputs import local_inputs

    quiet = args.quiet or args.json
    # Before torch is imported.
    source, base = local_inputs(
        args.source, args.base, args.output, overwrite=args.overwrite, quiet=quiet
    )
    from vllm_qoq.importer.job import import_checkpoint

    imported = import_checkpoint(
        source,
        base,
        args.output,
        kv_bits=args.kv_bits,
        s2_order=args.s2_order,
        dry_run=args.dry_run,
        overwrite=args.overwrite,
        quiet=quiet,
    )
    print(_document(args, imported) if args.json else _text(args, imported))
    return 0


def _document(args: argparse.Namespace, imported: Imported) -> str:
    return json.dumps(
        {
            "output": str(args.output),
            "dry_run": args.dry_run,
            "format": _FORMATS[imported.kind],
            "layers": imported.layers,
            "s2_order_repaired": imported.is_s2_order_repaired,
            "dropped": list(imported.dropped),
            "notes": list(imported.notes),
            "total_bytes": imported.total_bytes,
            "shards": list(imported.shards),
            "quantization_config": imported.section.to_json(),
        }
    )


def _text(args: argparse.Namespace, imported: Imported) -> str:
    from vllm_qoq.progress import human_bytes

    verb = "would write" if args.dry_run else "wrote"
    head = (
        f"{verb} {args.output}: {_FORMATS[imported.kind]}, {imported.layers} layers, "
        f"{human_bytes(imported.total_bytes)} in {len(imported.shards)} shards"
    )
    return "\n".join((head, *imported.notes))
