"""From the finished pieces to a checkpoint, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from merge_tools import verify
from merge_tools.execute import replacing
from merge_tools.writer import copy_file, sync_folder, write_bytes, write_json, write_shard
from vllm_qoq.checkpoint import CONFIG, INDEX, ITEM_BYTES, TensorInfo
from vllm_qoq.format import SECTION, KVCache, LMHead, Section, join_name
from vllm_qoq.quantize import QuantizeError
from vllm_qoq.quantize.architectures import Architecture
from vllm_qoq.quantize.modifiers import piece
from vllm_qoq.quantize.options import Options
from vllm_qoq.quantize.workdir import WorkDir
from vllm_qoq.routing import DecodeRow, Routing

REPORT = "quantization_report.json"
SHARED = "shared"
_PROPAGATED = "propagated"
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")


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
    with replacing(out, overwrite) as folder:
        for name, shard in shards.items():
            _write(folder / name, shard)
        weight_map = {t.info.name: file for file, shard in shards.items() for t in shard}
        size = sum(t.info.nbytes for t in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index)
        write_json(folder / CONFIG, config(model, options))
        write_json(folder / REPORT, report)
        for item in sorted(model.iterdir()):
            is_ours = item.name in (CONFIG, REPORT, "README.md") or item.name.startswith(".")
            if item.is_file() and not is_ours and not item.name.endswith(_NOT_COPIED):
                copy_file(item, folder / item.name)
        write_bytes(folder / "README.md", _card(out.name, options).encode())
        sync_folder(folder)
        if findings := verify.structure(folder):
            raise QuantizeError(f"the quantized checkpoint is not sound: {findings[0]}")


def config(model: Path, options: Options) -> dict[str, Any]:
    """config.json of the output."""
    content: dict[str, Any] = json.loads((model / CONFIG).read_text(encoding="utf-8"))
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
    )


def _tensors(work: WorkDir, arch: Architecture, layers: int, options: Options) -> Iterator[_Stored]:
    """Everything to write: shared tensors first, then set by set."""
    names = {None: SHARED} | {i: piece(i) for i in range(layers)}
    for owner in (None, *options.sets):
        for index, name in names.items():
            if (index is None) != (owner is None):
                continue
            file = work.file(name)
            with safe_open(file, "pt") as pieces:
                for key in sorted(pieces.keys()):
                    head, _, rest = key.partition(".")
                    if owner is not None and head != owner:
                        continue
                    entry = pieces.get_slice(key)
                    layer = key if owner is None else f"{arch.blocks}.{index}.{rest}"
                    info = TensorInfo(
                        join_name(owner, layer), entry.get_dtype(), tuple(entry.get_shape()), ""
                    )
                    yield _Stored(info, file, key)


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


def _card(name: str, options: Options) -> str:
    """README.md with the front matter that the Hugging Face Hub reads."""
    tags = "\n".join(f"- {tag}" for tag in ("vllm", "qoq", "quantized"))
    return (
        f"---\nlibrary_name: vllm\ntags:\n{tags}\n---\n\n# {name}\n\n"
        f"Sets: {', '.join(options.sets)}, group size {options.group_size}, made by "
        "`vllm-qoq quantize` from one transformed model. vLLM with the plugin vllm-qoq runs "
        "each step in the set that suits it.\n\n"
        f"```\nvllm serve {name} --quantization qoq\n```\n\n"
        f"Options:\n\n```json\n{options.model_dump_json(indent=2)}\n```\n\n"
        f"Errors of every layer: `{REPORT}`.\n"
    )
