"""The contents of a checkpoint, assembled from the finished pieces in the work folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_qoq.checkpoint import card, transforms
from vllm_qoq.checkpoint.folder import Checkpoint, TensorInfo, read_config, side_files
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
from vllm_qoq.checkpoint.weights_digest import weights_digest
from vllm_qoq.checkpoint.writer import json_bytes
from vllm_qoq.models.table import LayerNames
from vllm_qoq.models.vision import (
    language_config,
    language_name,
    tower_modules,
    vision_language,
    whole_name,
)
from vllm_qoq.quantizer.inputs import is_tied, stays_tied
from vllm_qoq.quantizer.modifiers import piece
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.plan import Job
from vllm_qoq.quantizer.workdir import WorkDir
from vllm_qoq.routing.table import DecodeRow, Routing

REPORT = transforms.REPORT
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
    changes: Mapping[str, torch.Tensor],
) -> Content:
    """Describe the checkpoint made of the pieces in `work` and of the model's other files.

    changes  how the weights were transformed (`changes.stored`), nothing where they were not
    """
    whole = Checkpoint.open(job.model)
    stored = {one.info.name: one for one in _tensors(work, names, layers, options)}
    if vision_language(whole.config) is not None:
        stored = _in_whole_model(stored, whole, options)
    pieces = _Pieces()
    # The shared tensors of each module, and each set, begin a new file.
    groups = groupby((one.info for one in stored.values()), key=lambda i: i.name.partition(".")[0])
    shards = cut((list(group) for _, group in groups), job.max_shard_bytes)
    announced = section(options, names, tower_modules(whole.config))
    others = {REPORT: json_bytes(report)}
    if changes:
        every = [one.info for one in stored.values()]
        weights = weights_digest(every, lambda name: pieces.read(stored[name]))
        others[transforms.FILE] = transforms.encoded(changes, weights)
    text = _card(job.out.name, options, announced, job.model, stored.values())
    return Content(
        shards=shards,
        read=lambda info: pieces.read(stored[info.name]),
        config=_config(output_config(whole.config, announced), options),
        copied={file: job.model / file for file in side_files(job.model) if str(file) != REPORT},
        others={**others, card.README: text.encode()},
    )


def section(options: QuantizeOptions, names: LayerNames, towers: tuple[str, ...] = ()) -> Section:
    """Make the section of config.json, with prompts in the first set and generation in the last.

    towers  modules beside the language model
    """
    return Section(
        sets={kind.name: kind.config(names.floats, towers) for kind in options.kinds},
        routing=Routing(prefill=options.sets[0], decode=(DecodeRow(set_name=options.sets[-1]),)),
        kv_cache=KVCache(
            bits=options.kv_bits, hadamard=bool(options.kv_hadamard), k_mean=options.has_k_mean
        ),
        lm_head=LMHead(bits=8) if options.lm_head_bits == 8 else None,
        stream=Stream(rotation="stored") if options.turns_stream else None,
    )


def in_output(model: Path, layer: str) -> str:
    """Name a layer of the language model as the output does, which may have a tower, too."""
    return whole_name(layer) if vision_language(read_config(model)) is not None else layer


def _config(config: dict[str, Any], options: QuantizeOptions) -> dict[str, Any]:
    """Say in the config of an output, and in the part for texts, what the lm_head is."""
    tied = {"tie_word_embeddings": stays_tied(is_tied(language_config(config)), options)}
    text = config.get("text_config")
    return config | tied | ({"text_config": text | tied} if isinstance(text, dict) else {})


def _in_whole_model(
    stored: Mapping[str, _Stored], whole: Checkpoint, options: QuantizeOptions
) -> dict[str, _Stored]:
    """Name the tensors of a language model as in the whole one, and add those beside it."""
    found = {}
    for name, one in stored.items():
        owner, tensor = split_name(name, options.sets)
        tensor = whole_name(tensor)
        name = join_name(owner, tensor) if owner is not None else tensor
        found[name] = replace(one, info=replace(one.info, name=name))
    for name, info in whole.tensors.items():
        if language_name(name) is None and name not in found:
            copied = replace(info, file="")
            found[name] = _Stored(copied, whole.path / info.file, name)
    # The shared ones come first.
    return dict(sorted(found.items(), key=lambda x: split_name(x[0], options.sets)[0] is not None))


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
