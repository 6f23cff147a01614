"""Writing a merged checkpoint as planned, tensor by tensor; the inputs are only read."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from merge_tools import MergeError, nest
from merge_tools.norms import ratio
from merge_tools.plan import MergePlan
from merge_tools.survey import torch_dtype
from vllm_qoq.checkpoint import card
from vllm_qoq.checkpoint.folder import TensorInfo, side_files
from vllm_qoq.checkpoint.format import Section
from vllm_qoq.checkpoint.output_config import output_config
from vllm_qoq.checkpoint.shards import RECIPE, Content, is_told_anew, write_checkpoint
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.progress import Progress

if TYPE_CHECKING:
    import torch


def execute(
    plan: MergePlan,
    sources: Mapping[str, StoredSet],
    section: Section,
    out: Path,
    overwrite: bool,
    progress: Progress,
    model_card: bool = True,
) -> None:
    """Write the checkpoint `out`; a FormatError, OutputError or OSError leaves nothing behind."""
    prefill = sources[plan.prefill]
    others: dict[str, bytes | Path] = {
        f"recipe-{name}.yaml": source.checkpoint.path / RECIPE
        for name, source in sources.items()
        if (source.checkpoint.path / RECIPE).is_file()
    }
    if model_card:
        sizes = {owner: plan.bytes_of(owner) for owner in (None, *plan.sets)}
        inputs = [source.checkpoint.path for source in sources.values()]
        others[card.README] = card.text(out.name, section, sizes, inputs).encode()
    content = Content(
        shards=plan.shards,
        read=lambda info: _tensor(info, sources, plan),
        config=output_config(prefill.checkpoint.config, section, plan.dtype),
        copied=side_files_of(sources, plan.prefill),
        others=others,
    )
    write_checkpoint(out, content, overwrite, progress)


def _tensor(info: TensorInfo, sources: Mapping[str, StoredSet], plan: MergePlan) -> torch.Tensor:
    origin = plan.tensors[info.name].origin
    source = sources[origin.set_name]
    if origin.how == "ratio":
        return ratio(source, sources[plan.prefill], origin.tensor)
    if origin.how == "nest":
        return nest.residual(source, sources[plan.bases[origin.set_name]], origin.tensor)
    tensor = source.get(origin.tensor)
    return tensor.to(torch_dtype(info.dtype)) if origin.how == "cast" else tensor


def side_files_of(sources: Mapping[str, StoredSet], prefill: str) -> dict[Path, Path]:
    """Map each side file of the output, a relative path, to the file of an input it is a copy of.

    Side files are what `side_files` chooses: tokenizer, chat templates, generation config,
    licence. Those of the prefill set win; what only another set has is kept, too. Raises
    MergeError where two other sets have different files of one name, and the prefill set has none.
    """
    found: dict[Path, Path] = {}
    order = [prefill, *(name for name in sources if name != prefill)]
    for name in order:
        folder = sources[name].checkpoint.path
        for file in side_files(folder):
            if is_told_anew(file):
                continue
            before = found.setdefault(file, folder)
            if before in (folder, sources[prefill].checkpoint.path):
                continue
            if not filecmp.cmp(before / file, folder / file, shallow=False):
                raise MergeError(
                    f"{file}: differs between {before} and {folder}, and {prefill} has none; "
                    f"copy the right one into {sources[prefill].checkpoint.path}"
                )
    return {file: folder / file for file, folder in found.items()}
