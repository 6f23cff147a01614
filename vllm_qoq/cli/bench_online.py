"""The options and the work of `bench serving --online`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from vllm_qoq.bench import BenchError
from vllm_qoq.bench.serving.online import load
from vllm_qoq.cli import measurement
from vllm_qoq.cli.arguments import positive

if TYPE_CHECKING:
    from vllm_qoq.bench.serving.job import Job

_MOST = 1e6  # requests a second, seconds and milliseconds


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--online`, and the options that go with it."""
    group = parser.add_argument_group("requests that arrive one by one")
    group.add_argument(
        "--online",
        action="store_true",
        help="instead of batches, ask servers at several request rates with `vllm bench serve`; "
        "OUT gets online.json, online.md and online.png",
    )
    group.add_argument(
        "--rates",
        type=rates,
        default=load.RATES,
        metavar="R,...",
        help=f"requests a second (default: {','.join(f'{rate:g}' for rate in load.RATES)})",
    )
    group.add_argument(
        "--seconds",
        type=seconds,
        default=load.SECONDS,
        metavar="S",
        help=f"how long requests arrive at each rate (default: {load.SECONDS:g})",
    )
    group.add_argument(
        "--fewest",
        type=positive,
        default=load.FEWEST,
        metavar="N",
        help=f"the least requests at each rate (default: {load.FEWEST})",
    )
    group.add_argument(
        "--goodput",
        type=objective,
        default=load.OBJECTIVE,
        metavar="NAME:MS,...",
        help="what a good request takes at most, in ms, as `vllm bench serve` has it, of "
        f"{', '.join(load.PARTS)} (default: {load.as_option(load.OBJECTIVE)})",
    )


def rates(text: str) -> tuple[float, ...]:
    """Parse request rates, in ascending order: `4,0.5` gives (0.5, 4)."""
    found = [_number(part) for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of requests a second above 0 like 1,4,8"
        )
    return tuple(sorted(set(found)))


def seconds(text: str) -> float:
    """Parse a number of seconds above 0."""
    if not (found := _number(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return found


def objective(text: str) -> dict[str, float]:
    """Parse milliseconds by name, such as `ttft:500,tpot:25`."""
    parts = [part.partition(":") for part in text.split(",")]
    found = {name: _number(most) for name, _, most in parts}
    if len(found) < len(parts) or not all(found.values()) or found.keys() - load.PARTS.keys():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of milliseconds like "
            f"{load.as_option(load.OBJECTIVE)}, with each of {', '.join(load.PARTS)} at most once"
        )
    return found


def _number(text: str) -> float:
    """Parse a number above 0; 0 for what is none."""
    try:
        found = float(text)
    except ValueError:
        return 0.0
    return found if 0 < found < _MOST else 0.0


def check_options(
    args: argparse.Namespace, offline: Iterable[str], parser: argparse.ArgumentParser
) -> None:
    """Raise BenchError for options that belong to the other kind of run.

    offline  the options that only batches have
    """
    online = ("rates", "seconds", "fewest", "goodput")
    for name in offline if args.online else online:
        if getattr(args, name) != parser.get_default(name):
            option = f"--{name.replace('_', '-')}"
            raise BenchError(
                f"{option} is for batches that arrive together; leave out {option} or --online"
                if args.online
                else f"{option} is for requests that arrive one by one; add --online"
            )


def measure(args: argparse.Namespace, job: Job) -> int:
    """Run the benchmark; returns the exit code."""
    from vllm_qoq.bench.serving.online.job import check_online
    from vllm_qoq.bench.serving.online.run import clean
    from vllm_qoq.bench.serving.online.run import measure as serve_and_ask

    asked = load.Load(
        lengths=load.check_lengths(args.lengths),
        rates=args.rates,
        seconds=args.seconds,
        fewest=args.fewest,
        objective=args.goodput,
    )
    checked = check_online(job, asked)

    def finish() -> measurement.Finished:
        from vllm_qoq.bench.serving.online import plot, report
        from vllm_qoq.bench.serving.online.result import to_json

        result = serve_and_ask(checked, args.quiet or args.json)
        return measurement.Finished(
            to_json(result),
            report.markdown(result),
            partial(plot.save, result),
            partial(clean, checked, result),
        )

    return measurement.run(args, "online", measurement.check_vllm, finish)
