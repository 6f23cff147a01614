"""Carry out a plan: stream the tensors into a hidden folder, verify it, rename it.

The output is absent or complete (`replace`). Inputs are only read.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_tools import MergeError, card, compatible, nest, ours, verify
from merge_tools.norms import ratio
from merge_tools.plan import Plan, Planned
from merge_tools.progress import Progress
from merge_tools.replace import replacing
from merge_tools.sources import WeightSet
from merge_tools.survey import torch_dtype
from merge_tools.writer import copy_file, sync_folder, write_bytes, write_json, write_shard
from vllm_qoq.checkpoint import CONFIG, INDEX, TensorInfo, side_files
from vllm_qoq.format import Section

_PIECE_BYTES = 16 << 20
_README, _RECIPE = "README.md", "recipe.yaml"
# Of a checkpoint of ours that was an input of something before, and not true of this one.
_OURS = frozenset({"quantization_report.json", "qoq_tune.json"})


def execute(
    plan: Plan,
    sources: Mapping[str, WeightSet],
    section: Section,
    out: Path,
    overwrite: bool,
    progress: Progress,
    model_card: bool = True,
    notes: Sequence[str] = (),
) -> None:
    """Write the checkpoint `out`; `notes` go into its model card.

    MergeError, FormatError or OSError leave nothing behind.
    """
    with replacing(out, overwrite, ours.foreign) as folder:
        with progress.stage("write", plan.total_bytes) as advance:
            for file, shard in plan.shards.items():
                _write(folder / file, shard, sources, plan, advance)
        config = compatible.merged_config(sources[plan.prefill], section, plan.dtype)
        write_json(folder / CONFIG, config)
        copied = _copy_side_files(folder, sources, plan.prefill)
        weight_map = {p.info.name: p.info.file for p in plan.tensors}
        write_json(folder / INDEX, ours.index(weight_map, plan.total_bytes, copied))
        if model_card:
            sizes = {owner: plan.bytes_of(owner) for owner in (None, *plan.sets)}
            inputs = [source.checkpoint.path for source in sources.values()]
            text = card.text(out.name, section, sizes, inputs, notes)
            write_bytes(folder / _README, text.encode())
        sync_folder(folder)
        if findings := verify.structure(folder):
            raise MergeError(f"the written checkpoint is not sound: {findings[0]}")


def _write(
    path: Path,
    shard: Sequence[Planned],
    sources: Mapping[str, WeightSet],
    plan: Plan,
    advance: Any,
) -> None:
    planned = {p.info.name: p for p in shard}

    def read(info: TensorInfo) -> Iterator[memoryview]:
        flat = _tensor(planned[info.name], sources, plan).contiguous().reshape(-1)
        data = memoryview(flat.view(_uint8()).numpy())
        for start in range(0, len(data), _PIECE_BYTES):
            yield data[start : start + _PIECE_BYTES]
        advance(info.nbytes)

    write_shard(path, [p.info for p in shard], read)


def _tensor(planned: Planned, sources: Mapping[str, WeightSet], plan: Plan) -> Any:
    origin = planned.origin
    source = sources[origin.set_name]
    if origin.how == "ratio":
        return ratio(source, sources[plan.prefill], origin.tensor)
    if origin.how == "nest":
        return nest.residual(source, sources[plan.bases[origin.set_name]], origin.tensor)
    tensor = source.get(origin.tensor)
    return tensor.to(torch_dtype(planned.info.dtype)) if origin.how == "cast" else tensor


def _uint8() -> Any:
    import torch

    return torch.uint8


def _copy_side_files(
    folder: Path, sources: Mapping[str, WeightSet], prefill: str
) -> Iterable[Path]:
    """Tokenizer, chat templates, generation config, licence: what `side_files` chooses."""
    files = side_files_of(sources, prefill)
    for file, source in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source / file, folder / file)
    for name, weights in sources.items():
        recipe = weights.checkpoint.path / _RECIPE
        if recipe.is_file():
            copy_file(recipe, folder / f"recipe-{name}.yaml")
    return files


def side_files_of(sources: Mapping[str, WeightSet], prefill: str) -> dict[Path, Path]:
    """File of the output, relative -> the input folder that it comes from.

    The prefill set's come first; what only another set has is kept, too. MergeError where two
    other sets have different files of one name, and the prefill set has none.
    """
    found: dict[Path, Path] = {}
    order = [prefill, *(name for name in sources if name != prefill)]
    for name in order:
        folder = sources[name].checkpoint.path
        for file in side_files(folder):
            if str(file) == _RECIPE or str(file) in _OURS:
                continue
            before = found.setdefault(file, folder)
            if before in (folder, sources[prefill].checkpoint.path):
                continue
            if not filecmp.cmp(before / file, folder / file, shallow=False):
                raise MergeError(
                    f"{file}: differs between {before} and {folder}, and {prefill} has none; "
                    f"copy the right one into {sources[prefill].checkpoint.path}"
                )
    return found
