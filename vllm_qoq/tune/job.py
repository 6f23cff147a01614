"""One run: measure or remember, choose, check, write."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vllm_qoq.bench.progress import say
from vllm_qoq.routing import Routing
from vllm_qoq.tune import device, keep, memory
from vllm_qoq.tune.choose import choose
from vllm_qoq.tune.engine import OpenEngine
from vllm_qoq.tune.measure import SUSPICIOUS, check, measure
from vllm_qoq.tune.measurements import PREFILL_TOKENS, Check, Measurements, decode_batches
from vllm_qoq.tune.preferences import SLOWER
from vllm_qoq.tune.target import Target


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    prefer            a key of `choose.SLOWER`
    max_batch         the largest decode step to measure
    again             measure even if there are measurements of this device
    dry_run           leave the checkpoint as it is
    drop_layer_rules  of the routing that is there
    keep              decoder layers that generate in the most accurate set
    """

    prefer: str
    max_batch: int
    again: bool = False
    dry_run: bool = False
    drop_layer_rules: bool = False
    keep: tuple[str, ...] = ()
    quiet: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of it; `notes` are sentences for the user."""

    folder: Path
    request: Request
    order: tuple[str, ...]
    measured: Measurements
    is_remembered: bool
    before: Routing
    routing: Routing
    check: Check | None
    notes: tuple[str, ...] = field(default=())


def tune(target: Target, request: Request, open_engine: OpenEngine) -> Outcome:
    """Carry out `request`. Nothing is written before everything is measured."""
    notes: list[str] = []
    key = device.key(target.digest)
    known, problem = memory.load(target.folder)
    sets = tuple(target.section.sets)
    run = None
    if not request.again:
        run, reason = memory.recall(known, key, sets, request.max_batch)
        notes += [note for note in (problem, reason) if note]
    for note in notes if not request.quiet else ():
        say(note)

    engine = None
    if run is None:
        decode = decode_batches(request.max_batch)
        with device.within_memory(target.folder):
            engine = open_engine(target.folder, sets, request.max_batch)
            measured = measure(engine, key, sets, decode, PREFILL_TOKENS, request.quiet)
        run = memory.Run(measured=measured)

    others = () if request.drop_layer_rules else target.section.routing.layers
    rules = keep.rules(request.keep, target.order[0], others)
    measured, checked = run.measured, run.check
    load = target.section.routing.load
    routing = choose(measured.estimates(), target.order, request.prefer, rules, load)
    if engine is not None:
        with device.within_memory(target.folder):
            checked = check(engine, routing, measured.sets, measured.decode, request.quiet)
    elif checked is not None and checked.routing != routing.to_json():
        checked = None
    if not request.dry_run:
        if engine is not None:
            kept = memory.Run(measured=measured, check=checked)
            memory.save(target.folder, known.with_run(kept))
        target.write(routing)
    return Outcome(
        folder=target.folder,
        request=request,
        order=target.order,
        measured=measured,
        is_remembered=engine is None,
        before=target.section.routing,
        routing=routing,
        check=checked,
        notes=(*notes, *_findings(routing, checked, request)),
    )


def _findings(routing: Routing, checked: Check | None, request: Request) -> list[str]:
    """What a user should know of the routing before serving with it."""
    found = []
    if request.keep:
        found.append(f"{len(request.keep)} decoder layers generate in the most accurate set")
    if old := len(routing.layers) - len(request.keep):
        found.append(
            f"{old} layer rules of the old routing stay in force, and the set was chosen as if "
            "they were not there; --drop-layer-rules removes them"
        )
    if routing.load is not None:
        found.append(
            "'load' of the old routing stays in force; the other sets were chosen and measured "
            "as of a calm engine"
        )
    if checked is None:
        found.append("whole steps were not measured with this routing; --again does it")
        return found
    if not checked.routed:
        found.append("whole steps were not measured: the KV cache of the test was too small")
    accepted = SLOWER[request.prefer]
    for batch in checked.routed:
        if (slower := checked.slowdown(batch)) > SUSPICIOUS:
            best = min(checked.step_seconds[batch], key=checked.step_seconds[batch].__getitem__)
            found.append(
                f"WARNING: at batch {batch} a whole step with this routing is {slower:.0%} slower "
                f"than with {best} alone (--prefer {request.prefer} accepts {accepted:.0%}); "
                "--prefer speed chooses by time alone"
            )
    return found
