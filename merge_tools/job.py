"""A merge from start to end: open, compare, plan, check every number, write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from merge_tools import MergeError, compatible, execute, unused
from merge_tools import nest as nesting
from merge_tools.norms import ratio
from merge_tools.plan import MergePlan, make_plan
from merge_tools.sources import check_distinct, open_sources
from merge_tools.survey import survey
from vllm_qoq.checkpoint import complete, hub, layer_rules, served, stream, values
from vllm_qoq.checkpoint.format import ResidualSet, Section, Stream
from vllm_qoq.checkpoint.output import check_output, check_space
from vllm_qoq.checkpoint.shards import MAX_SHARD_BYTES
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.errors import FormatError
from vllm_qoq.models.names import split_expert
from vllm_qoq.numerics import MAX_CLIPPED
from vllm_qoq.progress import Progress
from vllm_qoq.routing.table import DecodeRow, Routing


@dataclass(frozen=True)
class Merged:
    """The result of a merge, as written or, in a dry run, as it would be.

    clipped_shares  layer -> share of its residuals that were clipped, where a set was nested
    left_out        (set, tensor, reason) for each tensor that the output does not have
    """

    plan: MergePlan
    section: Section
    clipped_shares: Mapping[str, float]
    left_out: tuple[tuple[str, str, str], ...]


def merge(
    folders: Mapping[str, str | Path],
    output: str | Path,
    routing: Routing | None = None,
    *,
    nest: bool = False,
    max_clipped: float = MAX_CLIPPED,
    dtype: Literal["bfloat16", "float16"] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    model_card: bool = True,
    dry_run: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
) -> Merged:
    """Merge finished checkpoints of one model into one checkpoint with several sets.

    folders          name of a set -> the folder of its checkpoint, or its id on the Hugging Face
                     Hub, which is downloaded first
    output           the folder to make
    routing          which set runs when; by default prompts in the first set and generation in
                     the last
    nest             store the 8-bit set, or the float model, as a residual on the qoq_linear set
    max_clipped      share of a layer's weights that nesting may clip
    dtype            in which all sets run; by default what they say, bfloat16 where they differ
    max_shard_bytes  size of a file with weights, at most
    model_card       whether to write a README.md
    dry_run          check everything and write nothing
    overwrite        replace an older output, if it is ours
    quiet            print no progress

    Raises UserError (MergeError, FormatError, OutputError, RoutingError) with what is wrong and
    what to do, before anything is written; an output is complete or absent.
    """
    out = Path(output)
    routing = _default_routing(list(folders)) if routing is None else routing
    routing.check_sets(list(folders))
    if not nest:  # A folder given twice to --nest is refused by its kind instead.
        check_distinct({name: Path(folder) for name, folder in folders.items()})
    paths = _local_folders(folders, out, overwrite=overwrite, quiet=quiet)
    if not nest:  # An id may stand for a folder of the cache that is given, too.
        check_distinct(paths)
    check_output(out, paths.values(), overwrite)
    opened = {source.name: source for source in open_sources(paths, takes_floats=nest)}
    for source in opened.values():
        source.checkpoint.check_links()
    runs_in = compatible.choose_dtype(list(opened.values()), opened[routing.prefill], dtype)
    is_dtype_new = dtype is not None or compatible.has_several_dtypes(list(opened.values()))
    sources, left_out = _of_one_model(opened, routing.prefill)
    every, prefill = list(sources.values()), sources[routing.prefill]
    execute.side_files_of(sources, prefill.name)
    pair = nesting.pair(every) if nest else None
    quantized = frozenset().union(*(source.quantized for source in every))
    # Experts in float may differ between the sets, which only reading them tells.
    may_differ = (layer for layer in prefill.layers if split_expert(layer) is not None)
    layer_rules.check(routing, {*quantized, *may_differ})

    progress = Progress(quiet)
    found = survey(every, prefill, progress, compatible.stored_name(runs_in))
    layer_rules.check(routing, filter(found.is_per_set, prefill.layers))
    if pair is not None:
        nesting.check_basis(found, *pair)
    plan = make_plan(
        found,
        prefill.checkpoint.config,
        max_shard_bytes,
        bases={pair[0].name: pair[1].name} if pair is not None else {},
        dtype=runs_in if is_dtype_new else None,
    )
    check_space(out, plan.total_bytes)
    _check_ratios(plan, sources)
    _check_numbers(every, prefill, progress)
    shares = nesting.clipped_shares(*pair, progress) if pair is not None else {}
    nesting.check_clipped(shares, max_clipped)
    section = _section(sources, routing, plan, stream.of_source(prefill))
    if not dry_run:
        execute.execute(
            plan,
            sources,
            section,
            out,
            overwrite=overwrite,
            progress=progress,
            model_card=model_card,
        )
    zeros = [(owner, tensor, "a bias of zeros") for owner, tensor in plan.dropped]
    return Merged(plan=plan, section=section, clipped_shares=shares, left_out=(*left_out, *zeros))


def _local_folders(
    folders: Mapping[str, str | Path], out: Path, *, overwrite: bool, quiet: bool
) -> dict[str, Path]:
    """Find the folders of the sources, which may be ids of the Hugging Face Hub."""
    here = {
        name: hub.local_folder(folder)
        for name, folder in folders.items()
        if not hub.is_to_download(folder)
    }
    if len(here) < len(folders):  # before minutes of downloads
        check_output(out, here.values(), overwrite)
    return {
        name: here[name] if name in here else hub.local_folder(folder, quiet=quiet)
        for name, folder in folders.items()
    }


def _default_routing(names: list[str]) -> Routing:
    if not names:
        raise MergeError("no sets; give the folder of each set under its name")
    return Routing(prefill=names[0], decode=(DecodeRow(set_name=names[-1]),))


def _of_one_model(
    opened: Mapping[str, StoredSet], prefill: str
) -> tuple[dict[str, StoredSet], list[unused.LeftOutTensor]]:
    """Leave out what the model does not use, and refuse sources of different models."""
    sources, left_out = dict(opened), []
    for name, source in sources.items():
        sources[name], found = unused.leave_out(source)
        left_out += found
    sources, found = unused.leave_out_zero_biases(sources)
    left_out += found
    for source in sources.values():
        complete.check(source)
    sources, found = unused.settle(sources, prefill)
    left_out += found
    compatible.check(list(sources.values()), sources[prefill])
    return sources, left_out


def _check_ratios(plan: MergePlan, sources: Mapping[str, StoredSet]) -> None:
    """Raise MergeError for norms that no ratio brings together, before anything is written."""
    origins = {planned.origin for planned in plan.tensors.values()}
    for origin in sorted(
        (origin for origin in origins if origin.how == "ratio"),
        key=lambda origin: (origin.set_name, origin.tensor),
    ):
        ratio(sources[origin.set_name], sources[plan.prefill], origin.tensor)


def _check_numbers(sources: Iterable[StoredSet], prefill: StoredSet, progress: Progress) -> None:
    """Read every tensor, and hold the other sets' keys and values against the prefill set's."""
    sources = list(sources)
    total = sum(source.checkpoint.total_bytes for source in sources)
    with progress.stage("check values", total) as advance:
        for source in sources:
            for info in source.tensors.values():
                values.check(source.checkpoint, info)
                advance(info.nbytes)
    for source in sources:
        values.check_set(source)
    for finding in (line for source in sources for line in served.hidden_order(source)):
        raise FormatError(finding)
    for source in sources:
        if source is not prefill:
            _check_kv(prefill, source)


def _check_kv(prefill: StoredSet, source: StoredSet) -> None:
    from merge_tools import kv_basis  # which imports torch

    kv_basis.check(prefill, source)
    for tensor in kv_basis.biases(prefill, source):
        raise MergeError(
            f"{tensor}: differs between {prefill.name} and {source.name}, so their keys or values "
            "cannot share a KV cache; quantize both from one model"
        )


def _section(
    sources: Mapping[str, StoredSet], routing: Routing, plan: MergePlan, basis: Stream | None
) -> Section:
    configs = {name: dict(source.config) for name, source in sources.items()}
    configs |= {name: ResidualSet(base=base).model_dump() for name, base in plan.bases.items()}
    return Section(
        sets=configs,
        routing=routing,
        input_ratio=dict(plan.input_ratio),
        float_experts=plan.float_experts,
        stream=basis,
    )
