"""Writing of a whole checkpoint, and which tensor goes into which file.

Everything that makes a checkpoint (quantize, merge, import) writes it here, so that an output is
complete, checked and ours, or is not there at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_qoq.checkpoint import ours, verify
from vllm_qoq.checkpoint.folder import INDEX, ITEM_BYTES, TensorInfo
from vllm_qoq.checkpoint.replace import replacing
from vllm_qoq.checkpoint.writer import copy_file, sync_folder, write_bytes, write_json, write_shard
from vllm_qoq.errors import FormatError
from vllm_qoq.models.config import CONFIG
from vllm_qoq.progress import Progress

if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 5 * 10**9
"""How large a file with weights gets, unless the user says otherwise."""

RECIPE = "recipe.yaml"
"""The file in which llmcompressor says what it did; outputs keep one for each set."""

_PIECE_BYTES = 16 << 20
# Reports in an input that was a checkpoint of ours, which are not true of the output.
_REPORTS = frozenset({"quantization_report.json", "qoq_tune.json"})

Shards = Mapping[str, Sequence[TensorInfo]]
"""File name -> the tensors in it, in the order of their bytes."""


@dataclass(frozen=True)
class Content:
    """The content of a checkpoint that is to be written.

    shards  the tensors by file, as `cut` makes them
    read    function that gives a tensor named in `shards` when it is written
    config  the content of config.json
    copied  file of the output, a relative path -> the file of a model that it is a copy of
    others  name of a file that is ours -> its bytes, or the file that it is a copy of
    """

    shards: Shards
    read: Callable[[TensorInfo], torch.Tensor]
    config: Mapping[str, Any]
    copied: Mapping[Path, Path]
    others: Mapping[str, bytes | Path] = field(default_factory=dict)


def is_told_anew(file: Path) -> bool:
    """Whether a side file of an input is not copied, because the output has its own or none."""
    return str(file) == RECIPE or str(file) in _REPORTS


def cut(groups: Iterable[Sequence[TensorInfo]], max_bytes: int) -> dict[str, list[TensorInfo]]:
    """Cut groups of tensors into files of at most `max_bytes`, unless one tensor alone is larger.

    A group begins a new file, so that a set can be downloaded without the others. The tensors that
    are returned name their file.
    """
    shards: list[list[TensorInfo]] = []
    for group in groups:
        room = -1
        for info in group:
            if info.nbytes > room:
                shards.append([])
                room = max_bytes
            shards[-1].append(info)
            room -= info.nbytes
    named = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # With wide items first, every tensor starts at a multiple of its item size,
        # which readers need to map it without a copy.
        shard.sort(key=lambda info: (-ITEM_BYTES[info.dtype], info.name))
        named[file] = [replace(info, file=file) for info in shard]
    return named


def total_bytes(shards: Shards) -> int:
    """Count the bytes of all tensors."""
    return sum(info.nbytes for shard in shards.values() for info in shard)


def write_checkpoint(out: Path, content: Content, overwrite: bool, progress: Progress) -> None:
    """Write the checkpoint `out` beside its name, check it, and give it the name.

    A FormatError, OutputError or OSError leaves nothing behind, and an older `out` as it was.
    """
    shards = content.shards
    with replacing(out, overwrite, ours.foreign) as folder:
        with progress.stage("write", total_bytes(shards)) as advance:
            for file, shard in shards.items():
                write_shard(folder / file, shard, lambda info: _pieces(content, info, advance))
        weight_map = {info.name: info.file for shard in shards.values() for info in shard}
        write_json(folder / INDEX, ours.index(weight_map, total_bytes(shards), content.copied))
        write_json(folder / CONFIG, content.config)
        for target, source in content.copied.items():
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            copy_file(source, folder / target)
        for name, other in content.others.items():
            if isinstance(other, Path):
                copy_file(other, folder / name)
            else:
                write_bytes(folder / name, other)
        sync_folder(folder)
        if findings := verify.structure(folder):
            raise FormatError(f"the written checkpoint is not sound: {findings[0]}")


def _pieces(
    content: Content, info: TensorInfo, advance: Callable[[int], object]
) -> Iterator[memoryview]:
    """The bytes of a tensor, in pieces; `advance` is called once they are all written."""
    import torch

    flat = content.read(info).contiguous().reshape(-1)
    data = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    for start in range(0, len(data), _PIECE_BYTES):
        yield data[start : start + _PIECE_BYTES]
    advance(info.nbytes)
