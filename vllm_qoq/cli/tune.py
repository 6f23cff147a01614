"""The command `tune`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from vllm_qoq.cli import measurement
from vllm_qoq.cli.arguments import positive
from vllm_qoq.cli.parser import Commands, Parser
from vllm_qoq.tuner.preferences import DEFAULT, MAX_BATCH, SLOWER, check_max_batch


def add_parser(commands: Commands[Parser]) -> None:
    """Add the command to those of the program."""
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
        default=MAX_BATCH,
        metavar="N",
        help="largest decode step to measure (default: 256)",
    )
    parser.add_argument(
        "--tensor-parallel-size",
        type=positive,
        default=1,
        metavar="N",
        help="GPUs that will share each layer, as in `vllm serve` (default: 1)",
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
    measurement.add_output_options(parser, "tune", _tune)


def _tune(args: argparse.Namespace) -> int:
    from vllm_qoq.tuner.target import Target

    check_max_batch(args.max_batch)
    target = Target.open(args.checkpoint, will_write=not args.dry_run)
    target.check_split(args.tensor_parallel_size)
    kept = target.layers_to_keep(args.keep_first, args.keep_sensitive)

    def check() -> None:
        from vllm_qoq.tuner import device

        device.check_sets(target.methods)
        device.check_gpus(args.tensor_parallel_size)
        device.check_consent(writes=not args.dry_run, on_cpu=args.on_cpu)

    def work() -> measurement.Finished:
        from vllm_qoq.tuner import plot, report
        from vllm_qoq.tuner.job import Request, run

        request = Request(
            prefer=args.prefer,
            max_batch=args.max_batch,
            tensor_parallel_size=args.tensor_parallel_size,
            again=args.again,
            dry_run=args.dry_run,
            drop_layer_rules=args.drop_layer_rules,
            keep=kept,
            quiet=args.quiet or args.json,
        )
        outcome = run(target, request)
        drawn = partial(plot.save, outcome)
        return measurement.Finished(report.to_json(outcome), report.markdown(outcome), drawn)

    return measurement.run(args, "tune", check, work)
