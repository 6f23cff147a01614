"""The disk and memory that a quantization takes, known from headers and options."""

from __future__ import annotations

import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vllm_qoq.checkpoint.folder import ITEM_BYTES, Checkpoint
from vllm_qoq.checkpoint.language import beside_language
from vllm_qoq.models.linears import CONSTANT
from vllm_qoq.models.names import split_expert
from vllm_qoq.models.table import LayerNames
from vllm_qoq.numerics import group_count
from vllm_qoq.progress import human_bytes
from vllm_qoq.quantizer import QuantizeError
from vllm_qoq.quantizer.inputs import DTYPES, dtype_name, is_tied, stays_tied
from vllm_qoq.quantizer.model import Dimensions
from vllm_qoq.quantizer.options import QuantizeOptions

if TYPE_CHECKING:
    from vllm_qoq.quantizer.sets import SetKind

FLOATS_AT_ONCE = 1 << 26
"""So many floats of a weight are in float64 at once while it turns."""
_FLOAT32, _FLOAT64, _INT64 = 4, 8, 8
# Bytes of Python, torch, transformers and llmcompressor after work on a small model.
_LIBRARIES = 7 * 10**8
# Beside a Hessian, three matrices [K, K] are held while it is factored; later one, and so many
# float32 copies of the weights that read the input.
_FACTORING_COPIES, _WEIGHT_COPIES = 3, 5


class Stack(NamedTuple):
    """The layers that read one input, as one with `n` outputs and `k` inputs.

    share  the share of the tokens that it reads: an expert's is the mean over all experts
    """

    n: int
    k: int
    share: float = 1.0


@dataclass(frozen=True)
class Sizes:
    """The bytes that a quantization takes.

    output  the tensors of the checkpoint
    work    the pieces in the work folder, which exist until the output is complete
    memory  what is in memory at once, by its purpose
    head    the lm_head among `output`, 0 where it is the embedding
    gpu     the purposes of `memory` that are on the GPU where there is one
    """

    output: int
    work: int
    memory: dict[str, int]
    head: int
    gpu: frozenset[str] = frozenset(("calibration", "hessians", "rounding", "block"))

    def with_samples(self, found: int, asked: int) -> Sizes:
        """Count the pieces that a text has, where fewer than were asked for."""
        calibration = self.memory["calibration"] * found // asked
        return replace(self, memory={**self.memory, "calibration": calibration})


def sizes(
    checkpoint: Checkpoint,
    names: LayerNames,
    dimensions: Dimensions,
    linears: Mapping[str, tuple[int, int]],
    options: QuantizeOptions,
) -> Sizes:
    """Count the bytes of a run; `linears` has (N, K) of all layers to quantize."""
    item = _item_bytes(checkpoint, names)
    in_sets = {f"{layer}.{leaf}" for layer in linears for leaf in ("weight", "bias")}
    shared = sum(
        info.nbytes if names.keeps(name) else item * math.prod(info.shape)
        for name, info in checkpoint.tensors.items()
        if name not in in_sets and not name.endswith(CONSTANT)
    )
    beside = sum(info.nbytes for info in beside_language(checkpoint).values())
    vocabulary, hidden = _embedding(checkpoint, names)
    head = item * vocabulary * hidden
    stored_head = head if f"{names.head}.weight" in checkpoint.tensors else 0
    if options.lm_head_bits == 8:
        written_head = vocabulary * (hidden + _FLOAT32)
    else:
        written_head = 0 if stays_tied(is_tied(checkpoint.config), options) else head
    shared += written_head - stored_head
    if options.turns_stream:
        shared += hidden * hidden + item * hidden  # the tensors that turn hidden states back
    if options.has_k_mean:
        with_keys = sum(names.of_block(i).has_keys for i in range(dimensions.layers))
        shared += _FLOAT32 * with_keys * dimensions.kv_heads * dimensions.head_dim
    biases = item * sum(
        n for layer, (n, _) in linears.items() if f"{layer}.bias" in checkpoint.tensors
    )
    sets = sum(
        biases + sum(layer_bytes(kind, n, k, item) for n, k in linears.values())
        for kind in options.kinds
    )
    output, work = shared + beside + sets, shared + sets
    blocks = stacks(names, dimensions.layers, linears)
    weights = [sum(stack.n * stack.k for stack in block) for block in blocks]
    results = sets * max(weights) // sum(weights)
    memory = {
        "libraries": _LIBRARIES,
        "weights": item * sum(math.prod(i.shape) for i in checkpoint.tensors.values())
        + (head - stored_head),
        "calibration": 2 * item * options.samples * options.seqlen * hidden,
        # Every expert of a block has one.
        "hessians": _FLOAT32 * max(sum(stack.k**2 for stack in block) for block in blocks),
        "rounding": _FLOAT32
        * max(
            max(_FACTORING_COPIES * k * k, k * k + _WEIGHT_COPIES * n * k)
            for block in blocks
            for n, k, _ in block
        ),
        # Where it is rounded, with its results; those of the one before are written from a copy.
        "block": item * max(weights) + results,
        "results of a block": 2 * results,
        # What it becomes while it turns, its magnitudes, two bools of each, and the rows in work.
        "embedding": (2 * item + 2) * vocabulary * hidden
        + 2 * _FLOAT64 * min(FLOATS_AT_ONCE, vocabulary * hidden),
    }
    return Sizes(output, work, memory, written_head)


def layer_bytes(kind: SetKind, n: int, k: int, item: int) -> int:
    """Count the bytes of a layer [n, k] in one set, without its bias; a float has `item` bytes."""
    if kind.base is not None:
        return n * k // 2
    if kind.name == "w8a8":
        return n * k + item * n
    groups = 1 if kind.group_size == -1 else group_count(k, kind.group_size)
    if kind.name == "w4a16":
        return n * k // 2 + item * n * groups + 2 * _INT64
    scales = 2 * _FLOAT32 * n if kind.group_size == -1 else (_FLOAT32 + 2 * groups) * n
    return n * k // 2 + scales


def check_disks(needs: Iterable[tuple[Path, int]]) -> None:
    """Raise QuantizeError unless every disk can take all that is written to it.

    needs  (folder or file that may not exist yet, bytes)
    """
    by_device: dict[int, list[tuple[Path, int]]] = defaultdict(list)
    for path, count in needs:
        by_device[os.stat(_existing(path)).st_dev].append((path, count))
    for parts in by_device.values():
        needed = sum(count for _, count in parts)
        free = shutil.disk_usage(_existing(parts[0][0])).free
        if free < needed:
            what = " and ".join(f"{path} ({human_bytes(count)})" for path, count in parts)
            raise QuantizeError(
                f"{what} need {human_bytes(needed)} on one disk, but {human_bytes(free)} are free; "
                "make room, or choose another disk for --output or --work-dir"
            )


def check_apart(work_dir: Path, out: Path, model: Path) -> None:
    """Raise QuantizeError where the work folder is, holds or lies in the output or the model."""
    work = work_dir.resolve()
    for option, folder in (("--output", out), ("the model", model)):
        other = folder.resolve()
        if work == other or work in other.parents or other in work.parents:
            raise QuantizeError(
                f"--work-dir {work_dir}: overlaps {option} {folder}; choose another --work-dir"
            )


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _embedding(checkpoint: Checkpoint, names: LayerNames) -> tuple[int, int]:
    """The vocabulary's and the hidden size."""
    name = f"{names.embedding}.weight"
    info = checkpoint.tensors.get(name)
    if info is None or len(info.shape) != 2:
        raise QuantizeError(
            f"{checkpoint.path}: {name} is {'missing' if info is None else 'not a matrix'}; "
            "download the model again"
        )
    return info.shape[0], info.shape[1]


def _item_bytes(checkpoint: Checkpoint, names: LayerNames) -> int:
    """The bytes of a float of the model as `load` has it."""
    name = dtype_name(checkpoint.config)
    stored = checkpoint.tensors[f"{names.embedding}.weight"].dtype
    return ITEM_BYTES[stored if name is None else DTYPES[name]]


def stacks(
    names: LayerNames, layers: int, linears: Mapping[str, tuple[int, int]]
) -> list[list[Stack]]:
    """List what reads one input in each of the `layers` blocks, in the order in which it runs."""
    found = []
    for index in range(layers):
        block = names.of_block(index)
        stacked = []
        for group in block.inputs:
            sizes_of = [linears[f"{names.blocks}.{index}.{name}"] for name in group]
            share = (
                1.0
                if split_expert(f"{names.blocks}.{index}.{group[0]}") is None
                else (block.expert_share)
            )
            stacked.append(Stack(sum(n for n, _ in sizes_of), sizes_of[0][1], share))
        found.append(stacked)
    return found
