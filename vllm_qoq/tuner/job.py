"""A tuning from start to end: measure or remember, choose, check, write."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vllm_qoq.progress import say
from vllm_qoq.routing.table import Routing
from vllm_qoq.tuner import device, keep, memory
from vllm_qoq.tuner.choose import choose
from vllm_qoq.tuner.engine import Engine
from vllm_qoq.tuner.measure import SUSPICIOUS, check, measure
from vllm_qoq.tuner.measurements import PREFILL_TOKENS, Measurements, StepCheck, decode_batches
from vllm_qoq.tuner.preferences import DEFAULT, MAX_BATCH, SLOWER, Preference, check_max_batch
from vllm_qoq.tuner.target import Target


@dataclass(frozen=True)
class Request:
    """A tuning as it is asked for.

    prefer            a key of `preferences.SLOWER`
    max_batch         the largest decode step to measure
    tensor_parallel_size  ranks that share each layer
    again             measure even if there are measurements of this device
    dry_run           leave the checkpoint as it is
    drop_layer_rules  leave out the layer rules of the routing that is there
    keep              decoder layers that generate in the most accurate set
    """

    prefer: Preference
    max_batch: int
    tensor_parallel_size: int = 1
    again: bool = False
    dry_run: bool = False
    drop_layer_rules: bool = False
    keep: tuple[str, ...] = ()
    quiet: bool = False


@dataclass(frozen=True)
class Outcome:
    """The outcome of a tuning; `notes` are sentences for the user."""

    folder: Path
    request: Request
    order: tuple[str, ...]
    measured: Measurements
    is_remembered: bool
    before: Routing
    routing: Routing
    check: StepCheck | None
    notes: tuple[str, ...] = field(default=())


def tune(
    checkpoint: str | Path,
    *,
    prefer: Preference = DEFAULT,
    max_batch: int = MAX_BATCH,
    tensor_parallel_size: int = 1,
    again: bool = False,
    drop_layer_rules: bool = False,
    keep_first: int = 0,
    keep_sensitive: int = 0,
    dry_run: bool = False,
    on_cpu: bool = False,
    quiet: bool = True,
) -> Outcome:
    """Measure the sets of a checkpoint on this machine and write the best routing into it.

    checkpoint        folder of a checkpoint with several sets
    prefer            how much slower than the fastest set a more accurate one may be
    max_batch         the largest decode step to measure
    tensor_parallel_size  ranks that share each layer, as vLLM's option of this name
    again             measure even if there are measurements of this device
    drop_layer_rules  leave out the layer rules of the routing that is there
    keep_first        the first so many decoder layers generate in the most accurate set
    keep_sensitive    so do those that lose most by the report of `quantize`
    dry_run           measure, and leave the checkpoint as it is
    on_cpu            write the routing for this machine's CPU, where there is no GPU
    quiet             print no progress

    Raises UserError with what is wrong and what to do. vLLM runs in this process, with tensor
    parallelism in one more for each rank.
    """
    check_max_batch(max_batch)
    target = Target.open(Path(checkpoint), will_write=not dry_run)
    target.check_split(tensor_parallel_size)
    kept = target.layers_to_keep(keep_first, keep_sensitive)
    device.check_sets(target.methods)
    device.check_gpus(tensor_parallel_size)
    device.check_consent(writes=not dry_run, on_cpu=on_cpu)
    request = Request(
        prefer=prefer,
        max_batch=max_batch,
        tensor_parallel_size=tensor_parallel_size,
        again=again,
        dry_run=dry_run,
        drop_layer_rules=drop_layer_rules,
        keep=kept,
        quiet=quiet,
    )
    return run(target, request)


def open_engine(
    folder: Path, sets: tuple[str, ...], max_batch: int, tensor_parallel_size: int
) -> Engine:
    """Load all `sets` of the checkpoint `folder` into vLLM for decode steps of up to `max_batch`.

    This takes as long as vLLM takes to start.
    """
    from vllm_qoq.tuner import vllm_engine

    return vllm_engine.open_engine(folder, sets, max_batch, tensor_parallel_size)


def run(target: Target, request: Request) -> Outcome:
    """Carry out `request`. Nothing is written before everything is measured."""
    notes: list[str] = []
    key = device.key(target.digest, request.tensor_parallel_size)
    known, problem = memory.load(target.folder)
    sets = tuple(target.section.sets)
    remembered = None
    if not request.again:
        remembered, reason = memory.recall(known, key, sets, request.max_batch)
        notes += [note for note in (problem, reason) if note]
    for note in notes if not request.quiet else ():
        say(note)

    opened = None
    if remembered is None:
        decode = decode_batches(request.max_batch)
        with device.within_memory(target.folder):
            opened = open_engine(
                target.folder, sets, request.max_batch, request.tensor_parallel_size
            )
            measured = measure(
                opened,
                key,
                sets,
                decode=decode,
                prefill=PREFILL_TOKENS,
                quiet=request.quiet,
            )
        remembered = memory.MeasuredRun(measured=measured)

    others = () if request.drop_layer_rules else target.section.routing.layers
    rules = keep.rules(request.keep, target.order[0], others)
    measured, checked = remembered.measured, remembered.check
    load = target.section.routing.load
    routing = choose(measured.estimates(), target.order, request.prefer, layers=rules, load=load)
    if opened is not None:
        with device.within_memory(target.folder):
            checked = check(
                opened,
                routing,
                measured.sets,
                decode=measured.decode,
                quiet=request.quiet,
            )
    elif checked is not None and checked.routing != routing.to_json():
        checked = None
    if not request.dry_run:
        if opened is not None:
            kept = memory.MeasuredRun(measured=measured, check=checked)
            memory.save(target.folder, known.with_run(kept))
        target.write(routing)
    return Outcome(
        folder=target.folder,
        request=request,
        order=target.order,
        measured=measured,
        is_remembered=opened is None,
        before=target.section.routing,
        routing=routing,
        check=checked,
        notes=(*notes, *_findings(routing, checked, request)),
    )


def _findings(routing: Routing, checked: StepCheck | None, request: Request) -> list[str]:
    """Say what a user should know of the routing before serving with it."""
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
