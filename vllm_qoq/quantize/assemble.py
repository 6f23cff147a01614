"""From the finished pieces to a checkpoint, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from merge_tools import card, ours, verify
from merge_tools.replace import replacing
from merge_tools.writer import copy_file, sync_folder, write_bytes, write_json, write_shard
from vllm_qoq.checkpoint import (
    CODE_KEYS,
    CONFIG,
    INDEX,
    ITEM_BYTES,
    TensorInfo,
    read_config,
    side_files,
)
from vllm_qoq.format import (
    SECTION,
    STREAM,
    KVCache,
    LMHead,
    Section,
    Stream,
    join_name,
    split_name,
)
from vllm_qoq.quantize import QuantizeError
from vllm_qoq.quantize.architectures import Architecture
from vllm_qoq.quantize.modifiers import piece
from vllm_qoq.quantize.options import Options
from vllm_qoq.quantize.workdir import WorkDir
from vllm_qoq.routing import DecodeRow, Routing

REPORT = "quantization_report.json"
SHARED = "shared"
_PROPAGATED = "propagated"


@dataclass(frozen=True)
class _Stored:
    """A tensor of the output: what it is called there, and where it lies now."""

    info: TensorInfo
    file: Path
    name: str


def write_checkpoint(
    out: Path,
    model: Path,
    work: WorkDir,
    arch: Architecture,
    layers: int,
    options: Options,
    report: dict[str, Any],
    max_shard_bytes: int,
    overwrite: bool,
) -> None:
    """Write `out` from the pieces in `work` and the other files of `model`; whole or not at all."""
    tensors = list(_tensors(work, arch, layers, options))
    shards = _shards(tensors, max_shard_bytes)
    with replacing(out, overwrite, ours.foreign) as folder:
        for name, shard in shards.items():
            _write(folder / name, shard)
        weight_map = {t.info.name: file for file, shard in shards.items() for t in shard}
        size = sum(t.info.nbytes for t in tensors)
        copied = [file for file in side_files(model) if str(file) != REPORT]
        write_json(folder / INDEX, ours.index(weight_map, size, copied))
        write_json(folder / CONFIG, config(model, options))
        write_json(folder / REPORT, report)
        for file in copied:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            copy_file(model / file, folder / file)
        write_bytes(folder / "README.md", _card(out.name, options, model, tensors).encode())
        sync_folder(folder)
        if findings := verify.structure(folder):
            raise QuantizeError(f"the quantized checkpoint is not sound: {findings[0]}")


def config(model: Path, options: Options) -> dict[str, Any]:
    """config.json of the output."""
    content = {key: value for key, value in read_config(model).items() if key not in CODE_KEYS}
    content[SECTION] = section(options).to_json()
    content["tie_word_embeddings"] = False
    return content


def section(options: Options) -> Section:
    """Prompts in the first set, generation in the last."""
    return Section(
        sets={kind.name: kind.config() for kind in options.kinds},
        routing=Routing(prefill=options.sets[0], decode=(DecodeRow(set_name=options.sets[-1]),)),
        kv_cache=KVCache(bits=options.kv_bits, hadamard=options.kv_hadamard),
        lm_head=LMHead(bits=8) if options.lm_head_bits == 8 else None,
        stream=Stream(rotation="stored") if options.rotate else None,
    )


def _tensors(work: WorkDir, arch: Architecture, layers: int, options: Options) -> Iterator[_Stored]:
    """Everything to write: shared tensors first, then set by set."""
    shared = [SHARED, STREAM] if options.rotate else [SHARED]
    for file in map(work.file, shared):
        for key, dtype, shape in _entries(file):
            yield _Stored(TensorInfo(key, dtype, shape, ""), file, key)
    for owner in options.sets:
        for index in range(layers):
            file = work.file(piece(index))
            for key, dtype, shape in _entries(file):
                head, _, rest = key.partition(".")
                if head == owner:
                    name = join_name(owner, f"{arch.blocks}.{index}.{rest}")
                    yield _Stored(TensorInfo(name, dtype, shape, ""), file, key)


def _entries(file: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of the tensors of a piece."""
    with safe_open(file, "pt") as tensors:
        for key in sorted(tensors.keys()):
            entry = tensors.get_slice(key)
            yield key, entry.get_dtype(), tuple(entry.get_shape())


def _shards(tensors: list[_Stored], max_bytes: int) -> dict[str, list[_Stored]]:
    """Cut into shards of at most `max_bytes`; a set begins a new one."""
    shards: list[list[_Stored]] = []
    owner, room = "", 0
    for tensor in tensors:
        head = tensor.info.name.partition(".")[0]
        if not shards or tensor.info.nbytes > room or head != owner:
            shards.append([])
            owner, room = head, max_bytes
        shards[-1].append(tensor)
        room -= tensor.info.nbytes
    named = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # Wide items first, so that every tensor begins at a multiple of its item size.
        shard.sort(key=lambda t: (-ITEM_BYTES[t.info.dtype], t.info.name))
        named[file] = [replace(t, info=replace(t.info, file=file)) for t in shard]
    return named


def _write(path: Path, shard: list[_Stored]) -> None:
    stored = {tensor.info.name: tensor for tensor in shard}

    def read(info: TensorInfo) -> Iterator[memoryview]:
        tensor = stored[info.name]
        with safe_open(tensor.file, "pt") as file:
            flat = file.get_tensor(tensor.name).contiguous().reshape(-1)
            yield memoryview(flat.view(torch.uint8).numpy())

    write_shard(path, [tensor.info for tensor in shard], read)


def _card(name: str, options: Options, model: Path, tensors: list[_Stored]) -> str:
    sizes: dict[str | None, int] = dict.fromkeys((None, *options.sets), 0)
    for tensor in tensors:
        sizes[split_name(tensor.info.name, options.sets)[0]] += tensor.info.nbytes
    body = (
        f"Sets made by `vllm-qoq quantize` from one transformed model, with the options\n\n"
        f"```json\n{options.model_dump_json(indent=2)}\n```\n\n"
        f"Errors of every layer: `{REPORT}`.\n"
    )
    return card.text(name, section(options), sizes, [model], body=body)
