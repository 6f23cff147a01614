"""The command `import`: arguments and output. Handlers import torch, `--help` does not."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the result of `ArgumentParser.add_subparsers`."""
    parser = commands.add_parser(
        "import", help="read a checkpoint of QServe or deepcompressor into ours"
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="folder with the weights")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="folder to make"
    )
    parser.add_argument(
        "--base",
        type=Path,
        required=True,
        metavar="HF_DIR",
        help="folder with config.json and tokenizer of the model that was quantized",
    )
    parser.add_argument(
        "--kv-bits",
        type=int,
        choices=(4, 8, 16),
        help="what K and V were prepared for (default: 4 for QoQ, 16 for W8A8)",
    )
    parser.add_argument(
        "--s2-order",
        choices=("qserve", "deepcompressor"),
        help="who packed a g128 checkpoint, where the numbers do not show it (default: qserve)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and show the plan, then stop")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT once done")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=_import)


def _import(args: argparse.Namespace) -> int:
    from merge_tools import preflight

    _check(args)
    from merge_tools.execute import execute
    from merge_tools.progress import Progress
    from vllm_qoq.importer import imported

    progress = Progress(args.quiet or args.json)
    opened = imported.open_source(args.source, args.base, args.s2_order)
    result = imported.make_set(opened, args.base, progress)
    plan, section = imported.plan(result), imported.section(result, args.kv_bits)
    preflight.check_space(args.output, plan.total_bytes)
    notes = _notes(opened)
    if not args.dry_run:
        sources = {result.name: result}
        execute(plan, sources, section, args.output, args.overwrite, progress, notes=notes)
    _report(args, opened, plan, section, notes)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be known without torch, before it is imported."""
    from merge_tools import preflight
    from vllm_qoq.checkpoint import Checkpoint, read_config, require_folder, side_files
    from vllm_qoq.importer.expected import expected

    require_folder(args.source)
    config = read_config(args.base)
    preflight.check_output(args.output, (args.source, args.base), args.overwrite)
    expected(config)
    Checkpoint(args.base, config, {}).check_links()
    side_files(args.base)  # which are copied at the end


def _notes(opened: Any) -> list[str]:
    """What an import did besides copying, for the model card and the terminal."""
    from vllm_qoq.importer.detect import KV_SCALE

    notes = []
    if scales := sum(name.endswith(KV_SCALE) for name in opened.dropped):
        notes.append(
            f"left out {scales} static KV cache scales ({KV_SCALE}): the cache is quantized per "
            "token here"
        )
    if others := len(opened.dropped) - scales:
        notes.append(f"left out {others} constants that the model computes (rotary_emb.inv_freq)")
    if opened.layers.repaired:
        notes.append(
            "put level-2 scales and zeros from deepcompressor's channel order right; "
            f"{opened.layers.proofs} of {len(opened.model.linears)} layers prove that order"
        )
    elif opened.layers.is_order_guessed:
        notes.append(
            "took level-2 scales and zeros in QServe's channel order, which no layer proves; if "
            "the model talks nonsense, import it again with --s2-order deepcompressor"
        )
    return notes


def _report(args: argparse.Namespace, opened: Any, plan: Any, section: Any, notes: Any) -> None:
    from merge_tools.progress import human_bytes

    formats = {"g128": "QoQ g128", "channel": "QoQ per channel", "w8a8": "W8A8"}
    if args.json:
        report = {
            "output": str(args.output),
            "dry_run": args.dry_run,
            "format": formats[opened.kind],
            "layers": len(opened.model.linears),
            "s2_order_repaired": opened.layers.repaired,
            "dropped": list(opened.dropped),
            "notes": notes,
            "total_bytes": plan.total_bytes,
            "shards": list(plan.shards),
            "quantization_config": section.to_json(),
        }
        print(json.dumps(report))
        return
    verb = "would write" if args.dry_run else "wrote"
    print(
        f"{verb} {args.output}: {formats[opened.kind]}, {len(opened.model.linears)} layers, "
        f"{human_bytes(plan.total_bytes)} in {len(plan.shards)} shards"
    )
    for note in notes:
        print(note)
