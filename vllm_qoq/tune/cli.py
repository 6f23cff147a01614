"""The command `tune`: arguments and checks. The handler imports torch, `--help` does not."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_qoq.bench import command
from vllm_qoq.bench.cli import positive
from vllm_qoq.tune import TuneError
from vllm_qoq.tune.preferences import DEFAULT, SLOWER

if TYPE_CHECKING:
    from vllm_qoq.tune.engine import OpenEngine

_LARGEST_BATCH = 1024


def add_parser(commands: Any, open_engine: OpenEngine) -> None:
    """Add the command to the result of `ArgumentParser.add_subparsers`.

    open_engine  vLLM's, which this package does not import
    """
    parser = commands.add_parser(
        "tune", help="measure the sets on this machine and write the best routing"
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="folder with several sets")
    parser.add_argument(
        "--prefer",
        choices=tuple(SLOWER),
        default=DEFAULT,
        help="how much slower than the fastest set a more accurate one may be: "
        + ", ".join(f"{name} {slower:.0%}%" for name, slower in SLOWER.items())
        + f" (default: {DEFAULT})",
    )
    parser.add_argument(
        "--max-batch",
        type=positive,
        default=256,
        metavar="N",
        help="largest decode step to measure (default: 256)",
    )
    parser.add_argument(
        "--again", action="store_true", help="measure even if qoq_tune.json has this device"
    )
    parser.add_argument(
        "--drop-layer-rules", action="store_true", help="of the routing that is there"
    )
    parser.add_argument(
        "--keep-first",
        type=positive,
        default=0,
        metavar="N",
        help="the first N decoder layers generate in the most accurate set",
    )
    parser.add_argument(
        "--keep-sensitive",
        type=positive,
        default=0,
        metavar="N",
        help="so do the N that lose most by the report of `vllm-qoq quantize`",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="measure and show; leave the checkpoint as it is"
    )
    parser.add_argument(
        "--on-cpu",
        action="store_true",
        help="write the routing for this machine's CPU, where there is no GPU",
    )
    command.add_output_options(parser, "tune")
    parser.set_defaults(run=partial(_tune, open_engine))


def _tune(open_engine: OpenEngine, args: argparse.Namespace) -> int:
    from vllm_qoq.tune.target import Target

    if args.max_batch > _LARGEST_BATCH:
        raise TuneError(f"--max-batch {args.max_batch}: is larger than {_LARGEST_BATCH}")
    target = Target.open(args.checkpoint, will_write=not args.dry_run)
    kept = target.layers_to_keep(args.keep_first, args.keep_sensitive)

    def check() -> None:
        from vllm_qoq.tune import device

        device.check({name: config["quant_method"] for name, config in target.section.sets.items()})
        device.check_consent(writes=not args.dry_run, on_cpu=args.on_cpu)

    def work() -> command.Finished:
        from vllm_qoq.tune import plot, report
        from vllm_qoq.tune.job import Request, tune

        request = Request(
            prefer=args.prefer,
            max_batch=args.max_batch,
            again=args.again,
            dry_run=args.dry_run,
            drop_layer_rules=args.drop_layer_rules,
            keep=kept,
            quiet=args.quiet or args.json,
        )
        outcome = tune(target, request, open_engine)
        drawn = partial(plot.save, outcome)
        return command.Finished(report.to_json(outcome), report.markdown(outcome), drawn)

    return command.run(args, "tune", check, work)
