"""The contents of a checkpoint, assembled from the finished pieces in the work folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_qoq.checkpoint import card
from vllm_qoq.checkpoint.folder import TensorInfo, read_config, side_files
from vllm_qoq.checkpoint.format import (
    STREAM,
    KVCache,
    LMHead,
    Section,
    Stream,
    join_name,
    split_name,
)
from vllm_qoq.checkpoint.output_config import output_config
from vllm_qoq.checkpoint.shards import Content, cut
from vllm_qoq.checkpoint.writer import json_bytes
from vllm_qoq.models.table import LayerNames
from vllm_qoq.quantizer.inputs import is_tied, stays_tied
from vllm_qoq.quantizer.modifiers import piece
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.plan import Job
from vllm_qoq.quantizer.workdir import WorkDir
from vllm_qoq.routing.table import DecodeRow, Routing

REPORT = "quantization_report.json"
SHARED = "shared"


@dataclass(frozen=True)
class _Stored:
    """A tensor of the output: what it will be there, and the `file` and `name` it has now."""

    info: TensorInfo
    file: Path
    name: str


class _Pieces:
    """A reader of pieces, which keeps the last one open: those of experts have long headers."""

    def __init__(self) -> None:
        self._open: tuple[Path, safe_open] | None = None

    def read(self, stored: _Stored) -> torch.Tensor:
        """Read a tensor."""
        if self._open is None or self._open[0] != stored.file:
            self._open = None
            self._open = (stored.file, safe_open(stored.file, "pt"))
        return self._open[1].get_tensor(stored.name)


def content(
    job: Job,
    work: WorkDir,
    names: LayerNames,
    layers: int,
    options: QuantizeOptions,
    report: dict[str, Any],
) -> Content:
    """Describe the checkpoint made of the pieces in `work` and of the model's other files."""
    stored = {one.info.name: one for one in _tensors(work, names, layers, options)}
    pieces = _Pieces()
    # The shared tensors of each module, and each set, begin a new file.
    groups = groupby((one.info for one in stored.values()), key=lambda i: i.name.partition(".")[0])
    shards = cut((list(group) for _, group in groups), job.max_shard_bytes)
    config = read_config(job.model)
    announced = section(options, names)
    text = _card(job.out.name, options, announced, job.model, stored.values())
    return Content(
        shards=shards,
        read=lambda info: pieces.read(stored[info.name]),
        config=output_config(config, announced)
        | {"tie_word_embeddings": stays_tied(is_tied(config), options)},
        copied={file: job.model / file for file in side_files(job.model) if str(file) != REPORT},
        others={REPORT: json_bytes(report), card.README: text.encode()},
    )


def section(options: QuantizeOptions, names: LayerNames) -> Section:
    """Make the section of config.json, with prompts in the first set and generation in the last."""
    return Section(
        sets={kind.name: kind.config(names.routers) for kind in options.kinds},
        routing=Routing(prefill=options.sets[0], decode=(DecodeRow(set_name=options.sets[-1]),)),
        kv_cache=KVCache(
            bits=options.kv_bits, hadamard=bool(options.kv_hadamard), k_mean=options.has_k_mean
        ),
        lm_head=LMHead(bits=8) if options.lm_head_bits == 8 else None,
        stream=Stream(rotation="stored") if options.turns_stream else None,
    )


def _tensors(
    work: WorkDir, names: LayerNames, layers: int, options: QuantizeOptions
) -> Iterator[_Stored]:
    """List all tensors to write: the shared ones first, then set by set."""
    shared = [SHARED, STREAM] if options.turns_stream else [SHARED]
    for file in map(work.file, shared):
        for key, dtype, shape in _entries(file):
            yield _Stored(TensorInfo(key, dtype, shape, ""), file, key)
    for owner in options.sets:
        for index in range(layers):
            file = work.file(piece(index))
            for key, dtype, shape in _entries(file):
                head, _, rest = key.partition(".")
                if head == owner:
                    name = join_name(owner, f"{names.blocks}.{index}.{rest}")
                    yield _Stored(TensorInfo(name, dtype, shape, ""), file, key)


def _entries(file: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """List name, dtype and shape of the tensors of a piece."""
    with safe_open(file, "pt") as tensors:
        for key in sorted(tensors.keys()):
            entry = tensors.get_slice(key)
            yield key, entry.get_dtype(), tuple(entry.get_shape())


def _card(
    name: str,
    options: QuantizeOptions,
    announced: Section,
    model: Path,
    tensors: Iterable[_Stored],
) -> str:
    sizes: dict[str | None, int] = dict.fromkeys((None, *options.sets), 0)
    for tensor in tensors:
        sizes[split_name(tensor.info.name, options.sets)[0]] += tensor.info.nbytes
    body = (
        f"Sets made by `vllm-qoq quantize` from one transformed model, with the options\n\n"
        f"```json\n{options.model_dump_json(indent=2)}\n```\n\n"
        f"Errors of every layer: `{REPORT}`.\n"
    )
    return card.text(name, announced, sizes, [model], body=body)
