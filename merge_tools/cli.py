"""The commands `merge`, `inspect` and `verify`: arguments, output, exit codes.

Exit codes: 0 done, 1 a check failed, 2 refused or bad usage, 130 interrupted.
Heavy modules are imported by the handlers, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import re
import signal
import sys
from pathlib import Path
from typing import Any

_REMEDIES = {
    errno.ENOSPC: "make room there or choose another disk",
    errno.EDQUOT: "make room in your quota or choose another disk",
    errno.EFBIG: "lower --max-shard-size, or raise the limit (ulimit -f)",
    errno.EACCES: "get the right to it or choose another place",
    errno.EROFS: "choose another place",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.ELOOP: "remove the circle of links",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "raise the limit (ulimit -n)",
}
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_ROUTING_BYTES = 1 << 20
# Findings of `verify` that are printed, and that --json has: a lost file brings thousands.
_SHOWN, _MOST = 20, 1000
_LONGEST_PATH = 1000
# examples/nested_16m.md
MAX_CLIPPED = 0.1
MAX_CLIPPED_HELP = f"of a layer's weights that nesting may clip (default: {MAX_CLIPPED})"


def add_parsers(commands: Any) -> None:
    """Add the three commands to the result of `ArgumentParser.add_subparsers`."""
    merge = commands.add_parser("merge", help="merge finished checkpoints of one model into one")
    merge.add_argument("sources", nargs="+", metavar="NAME=DIR", help="a set and its checkpoint")
    merge.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="folder to make"
    )
    merge.add_argument("--prefill", metavar="NAME", help="set for prompts (default: the first)")
    merge.add_argument(
        "--decode",
        metavar="[BATCH:]NAME,...",
        help="sets for generation by batch size, e.g. 16:w4a16,w8a8 (default: the last set)",
    )
    merge.add_argument(
        "--routing",
        type=Path,
        metavar="FILE",
        help="JSON file with the whole routing table, layer rules too; instead of the two above",
    )
    merge.add_argument(
        "--nest",
        action="store_true",
        help="store the 8-bit set (or the float model) as 4 bits on top of the qoq_linear set's",
    )
    merge.add_argument(
        "--max-clipped", default=MAX_CLIPPED, type=share, metavar="SHARE", help=MAX_CLIPPED_HELP
    )
    merge.add_argument(
        "--dtype",
        choices=("bfloat16", "float16"),
        help="in which all sets run (default: what they say; bfloat16 where they differ)",
    )
    merge.add_argument(
        "--max-shard-size",
        default="5GB",
        type=size,
        metavar="SIZE",
        help="of a file with weights, for example 500MB (default: 5GB)",
    )
    merge.add_argument("--dry-run", action="store_true", help="check and show the plan, then stop")
    merge.add_argument("--overwrite", action="store_true", help="replace OUT once done")
    merge.add_argument("--no-model-card", action="store_true", help="write no README.md")
    _common(merge, _merge)
    inspect = commands.add_parser("inspect", help="show sets, sizes and routing of a checkpoint")
    inspect.add_argument("checkpoint", type=Path)
    _common(inspect, _inspect)
    verify = commands.add_parser("verify", help="check that a checkpoint is whole and sane")
    verify.add_argument("checkpoint", type=Path)
    _common(verify, _verify)


def run(args: argparse.Namespace) -> int:
    """Call the handler and turn what it raises into a message and an exit code."""
    from vllm_qoq.errors import EngineError, UserError

    try:
        return int(args.run(args))
    except (UserError, EngineError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {_printable(_message(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # this is the end, also for a second one
        state = str(interrupt)
        print(f"interrupted{'; ' if state else ''}{_printable(state)}", file=sys.stderr)
        return 130


def _message(error: Exception) -> str:
    """What to tell of an error; of the system's, with the file and what to do."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    files = " -> ".join(
        str(file)[:_LONGEST_PATH] for file in (error.filename, error.filename2) if file is not None
    )
    remedy = _REMEDIES.get(error.errno)
    text = f"{files}: {error.strerror}" if files else str(error.strerror)
    return f"{text}; {remedy}" if remedy else text


def _common(parser: argparse.ArgumentParser, handler: Any) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=handler)


def _merge(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from merge_tools import (
        compatible,
        complete,
        execute,
        nest,
        preflight,
        rules,
        served,
        stream,
        unused,
    )
    from merge_tools.plan import make_plan
    from merge_tools.progress import Progress
    from merge_tools.sources import check_distinct, open_sources, parse_sources
    from merge_tools.survey import survey
    from vllm_qoq.format import FormatError

    folders = parse_sources(args.sources)
    if not args.nest:  # which says what kinds it takes
        check_distinct(folders)
    routing = _routing(args, list(folders))
    preflight.check_output(args.output, folders.values(), args.overwrite)
    sources = {source.name: source for source in open_sources(folders, takes_floats=args.nest)}
    prefill, progress = sources[routing.prefill], Progress(args.quiet or args.json)
    for source in sources.values():
        source.checkpoint.check_links()
    several = compatible.has_several_dtypes(list(sources.values()))
    dtype = compatible.choose_dtype(list(sources.values()), prefill, args.dtype)
    left_out = []
    for name, source in sources.items():
        sources[name], found_unused = unused.leave_out(source)
        left_out += found_unused
    sources, found_unused = unused.leave_out_zero_biases(sources)
    left_out += found_unused
    for source in sources.values():
        complete.check(source)
    sources, found_unused = unused.settle(sources, routing.prefill)
    left_out += found_unused
    prefill = sources[routing.prefill]
    compatible.check(list(sources.values()), prefill)
    execute.side_files_of(sources, prefill.name)
    nested = nest.pair(list(sources.values())) if args.nest else None
    rules.check(routing, frozenset().union(*(source.quantized for source in sources.values())))
    found = survey(list(sources.values()), prefill, progress, compatible.stored_name(dtype))
    if nested is not None:
        nest.check_basis(found, *nested)
    bases = {nested[0].name: nested[1].name} if nested is not None else {}
    plan = make_plan(found, prefill.checkpoint.config, args.max_shard_size, bases)
    if several or args.dtype:
        plan = replace(plan, dtype=dtype)
    preflight.check_space(args.output, plan.total_bytes)
    _check_values(list(sources.values()), progress)
    for finding in (line for source in sources.values() for line in served.hidden_order(source)):
        raise FormatError(finding)
    for source in sources.values():
        if source is not prefill:
            _check_kv(prefill, source)
    shares = nest.clipped_shares(*nested, progress) if nested is not None else {}
    nest.check_clipped(shares, args.max_clipped)
    section = _section(sources, routing, plan, stream.of_source(prefill))
    if not args.dry_run:
        execute.execute(
            plan, sources, section, args.output, args.overwrite, progress, not args.no_model_card
        )
    left_out += [(owner, tensor, "a bias of zeros") for owner, tensor in plan.dropped]
    _report(args, plan, section, shares, left_out)
    return 0


def _check_values(sources: list[Any], progress: Any) -> None:
    from merge_tools import values

    total = sum(source.checkpoint.total_bytes for source in sources)
    with progress.stage("check values", total) as advance:
        for source in sources:
            for info in source.tensors.values():
                values.check(source.checkpoint, info)
                advance(info.nbytes)
    for source in sources:
        values.check_set(source)


def _check_kv(prefill: Any, source: Any) -> None:
    from merge_tools import MergeError, kv_basis

    kv_basis.check(prefill, source)
    for tensor in kv_basis.biases(prefill, source):
        raise MergeError(
            f"{tensor}: differs between {prefill.name} and {source.name}, so their keys or values "
            "cannot share a KV cache; quantize both from one model"
        )


def _routing(args: argparse.Namespace, names: list[str]) -> Any:
    from vllm_qoq.routing import Routing, RoutingError, parse_decode

    if args.routing is not None:
        if args.prefill is not None or args.decode is not None:
            raise RoutingError("--routing is the whole table; leave out --prefill and --decode")
        return _read_routing(args.routing, names)
    decode = parse_decode(args.decode if args.decode is not None else names[-1])
    routing = Routing(prefill=names[0] if args.prefill is None else args.prefill, decode=decode)
    routing.check_sets(names)
    return routing


def _read_routing(path: Path, names: list[str]) -> Any:
    from vllm_qoq.checkpoint import read_json
    from vllm_qoq.errors import UserError
    from vllm_qoq.routing import Routing, RoutingError

    if not path.is_file():
        raise RoutingError(f"--routing {path}: no such file; give a file with a JSON object")
    try:
        return Routing.parse(read_json(path, _ROUTING_BYTES), names)
    except UserError as error:
        raise RoutingError(f"--routing {path}: {error}") from None


def _section(sources: dict[str, Any], routing: Any, plan: Any, basis: Any) -> Any:
    from vllm_qoq.format import ResidualSet, Section

    configs = {name: dict(source.config) for name, source in sources.items()}
    configs |= {name: ResidualSet(base=base).model_dump() for name, base in plan.bases.items()}
    ratios = dict(plan.input_ratio)
    return Section(sets=configs, routing=routing, input_ratio=ratios, stream=basis)


def _report(
    args: argparse.Namespace,
    plan: Any,
    section: Any,
    shares: dict[str, float],
    left_out: list[tuple[str, str, str]],
) -> None:
    from merge_tools.progress import human_bytes

    owners = {name: plan.bytes_of(name) for name in plan.sets}
    if args.json:
        report = {
            "output": str(args.output),
            "dry_run": args.dry_run,
            "bytes": owners,
            "shared_bytes": plan.bytes_of(None),
            "total_bytes": plan.total_bytes,
            "shards": list(plan.shards),
            "dropped": [f"{owner}.{tensor}" for owner, tensor, _ in left_out],
            **({"dtype": plan.dtype} if plan.dtype else {}),
            "quantization_config": section.to_json(),
            **({"clipped_shares": shares} if shares else {}),
        }
        print(json_line(report))
        return
    verb = "would write" if args.dry_run else "wrote"
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in owners.items())
    print(
        f"{verb} {args.output}: {human_bytes(plan.total_bytes)} in {len(plan.shards)} shards "
        f"({parts}, shared {human_bytes(plan.bytes_of(None))})"
    )
    if plan.dtype and not args.dtype:
        print(f"dtype: {plan.dtype}, for all sets, which name several; --dtype sets another")
    for owner, tensor, reason in left_out:
        print(_printable(f"left out {owner}.{tensor}: {reason}"))
    if shares:
        worst = max(shares, key=shares.__getitem__)
        mean = sum(shares.values()) / len(shares)
        print(f"clipped residuals: {mean:.2%} on average, {shares[worst]:.2%} in {worst}")
    print(f"routing: {json.dumps(section.routing.to_json())}")


def _inspect(args: argparse.Namespace) -> int:
    from merge_tools.inspect import describe, table

    report = describe(args.checkpoint)
    print(json_line(report) if args.json else table(report))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from merge_tools import verify
    from merge_tools.progress import Progress

    findings = verify.structure(args.checkpoint)
    findings += verify.contents(args.checkpoint, Progress(args.quiet or args.json))
    limits = {} if findings else verify.limits(args.checkpoint)
    notes = verify.notes(args.checkpoint)
    if args.json:
        report: dict[str, Any] = {"checkpoint": str(args.checkpoint), "findings": findings[:_MOST]}
        if len(findings) > _MOST:
            report["more_findings"] = len(findings) - _MOST
        report |= {"limit_shares": limits} if limits else {}
        report |= {"notes": notes} if notes else {}
        print(json.dumps(report))
    else:
        for finding in findings[:_SHOWN]:
            print(_printable(finding))
        if len(findings) > _SHOWN:
            print(f"and {len(findings) - _SHOWN} more")
        for name, share in limits.items():
            print(f"set {name}: at most {share:.2%} of the weights are clipped by their residual")
        for note in notes:
            print(f"note: {_printable(note)}")
        verdict = f"{len(findings)} findings" if findings else "verified"
        print(f"{_printable(str(args.checkpoint))}: {verdict}")
    return 1 if findings else 0


def json_line(report: dict[str, Any]) -> str:
    """A report as JSON, with null for NaN and infinity: a config.json may hold them, JSON not."""
    return json.dumps(json.loads(json.dumps(report), parse_constant=lambda _: None))


def size(text: str) -> int:
    """`5GB` -> 5000000000; for `argparse`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)", text.strip().upper())
    if match is None or not 0 < float(match[1]) < 1e15:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def share(text: str) -> float:
    """`0.01`; for `argparse`."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return found


def _printable(text: str) -> str:
    """Names in a checkpoint are untrusted: no control characters on the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
