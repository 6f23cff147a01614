"""A source as a set of our format, whose tensors are computed when they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from vllm_qoq.checkpoint.folder import CODE_KEYS, Checkpoint, TensorInfo, read_config
from vllm_qoq.checkpoint.format import QoQSet, split_layer
from vllm_qoq.checkpoint.layout import group_leaves
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.importer import detect, source
from vllm_qoq.importer.deepcompressor import RawLayers
from vllm_qoq.importer.detect import Kind
from vllm_qoq.importer.inputs import IMPORTED
from vllm_qoq.importer.qserve import PackedLayers
from vllm_qoq.importer.tiles import S2Order
from vllm_qoq.importer.values import to_half
from vllm_qoq.models.linears import LinearLayers, linear_layers
from vllm_qoq.models.tensors import EMBEDDING, HEAD
from vllm_qoq.progress import Progress

_DTYPE = "float16"
_W8A8: Mapping[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "format": "int-quantized",
            "weights": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
            "output_activations": None,
        }
    },
}


class SourceLayers(Protocol):
    """The linear layers of a source, in our tensors, which are `PackedLayers` or `RawLayers`."""

    repaired: bool
    proofs: int
    is_order_guessed: bool

    def check(self, layer: str) -> dict[str, torch.Tensor]:
        """Check every number of a layer; returns our tensors with a number per output channel."""

    def settle(self) -> None:
        """Decide on the order of permuted tensors, once all layers have been checked."""

    def weights(self, layer: str) -> dict[str, torch.Tensor]:
        """Convert a layer; returns our other tensors, by leaf."""


@dataclass(frozen=True)
class Opened:
    """A source whose names, dtypes and shapes are those of the base model."""

    kind: Kind
    model: LinearLayers
    tensors: source.Source
    layers: SourceLayers
    dropped: tuple[str, ...]
    """The tensors that have no place in our format."""


@dataclass(frozen=True)
class ImportedSet(StoredSet):
    """The only set of the output, which `get` converts; `checkpoint` is the base model's folder."""

    opened: Opened
    vectors: Mapping[str, torch.Tensor]
    """The tensors with a number per channel, kept because they come first in a shard."""
    _last: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def get(self, tensor: str) -> torch.Tensor:
        """Make a tensor of the output, by its name without the set."""
        layer, leaf = split_layer(tensor)
        if tensor in self.vectors:
            return self.vectors[tensor]
        if layer not in self.opened.model.linears or leaf == "bias":
            found = self.opened.tensors
            return to_half(found.tensors[tensor], found.get(tensor))
        if layer not in self._last:  # the tensors of a layer are written one after the other
            self._last.clear()
            self._last[layer] = self.opened.layers.weights(layer)
        return self._last[layer][leaf]


def open_source(folder: Path, base: Path, order: S2Order | None) -> Opened:
    """Open `folder` and hold its headers against the `config.json` of `base`."""
    is_raw = source.is_raw(folder)
    model = linear_layers(read_config(base), "imported", IMPORTED)
    if is_raw:
        weights, scales = source.open_raw(folder)
        kind = detect.raw_kind(scales.tensors, model)
        dropped = detect.check_raw(weights.tensors, kind, model)
        detect.check_scales(scales.tensors, kind, model)
        raw = RawLayers(weights, scales, kind)
        return Opened(kind, model, tensors=weights, layers=raw, dropped=tuple(dropped))
    weights = source.open_packed(folder)
    kind = detect.packed_kind(weights.tensors, model)
    dropped = detect.check_packed(weights.tensors, kind, model)
    packed = PackedLayers(weights, kind, order)
    return Opened(kind, model, tensors=weights, layers=packed, dropped=tuple(dropped))


def make_set(opened: Opened, base: Path, progress: Progress) -> ImportedSet:
    """Check every number of the source and describe the output. Nothing is written."""
    vectors = _check_values(opened, progress)
    opened.layers.settle()
    is_tied = _is_tied(opened)
    tensors = _infos(opened, is_tied)
    left_out = {"torch_dtype"} | CODE_KEYS
    config = {k: v for k, v in read_config(base).items() if k not in left_out}
    config |= {"dtype": _DTYPE, "tie_word_embeddings": is_tied}
    name = "w8a8" if opened.kind == "w8a8" else "w4a8"
    checkpoint = Checkpoint(base, config, {})
    return ImportedSet(
        name=name,
        checkpoint=checkpoint,
        config=_set_config(opened.kind),
        tensors=tensors,
        opened=opened,
        vectors=vectors,
    )


def _check_values(opened: Opened, progress: Progress) -> dict[str, torch.Tensor]:
    found, vectors = opened.tensors.tensors, {}
    bytes_of = {
        layer: sum(info.nbytes for info in leaves.values())
        for layer, leaves in group_leaves(found).items()
    }
    with progress.stage("check values", sum(bytes_of.values())) as advance:
        for layer in opened.model.linears:
            for leaf, values in opened.layers.check(layer).items():
                vectors[f"{layer}.{leaf}"] = values
            advance(bytes_of.pop(layer))
        for name in _plain(opened):
            to_half(found[name], opened.tensors.get(name))
            advance(bytes_of.pop(split_layer(name)[0], 0))
    return vectors


def _set_config(kind: Kind) -> Mapping[str, Any]:
    if kind == "w8a8":
        return _W8A8
    return _qoq_set(kind).model_dump(mode="json")


def _plain(opened: Opened) -> list[str]:
    """The tensors of the source that keep their form."""
    names = [*opened.model.others, *(f"{layer}.bias" for layer in opened.model.biased)]
    return [name for name in names if name in opened.tensors.tensors]


def _is_tied(opened: Opened) -> bool:
    """Whether the embedding is the lm_head; a rotation folds a norm into one of them only."""
    found = opened.tensors
    if not opened.model.is_tied or HEAD not in found.tensors:
        return opened.model.is_tied
    head, embedding = (to_half(found.tensors[x], found.get(x)) for x in (HEAD, EMBEDDING))
    return torch.equal(head, embedding)


def _infos(opened: Opened, is_tied: bool) -> dict[str, TensorInfo]:
    """Describe every tensor of the output, by its name without the set."""
    infos = {}
    for name in _plain(opened):
        if name != HEAD or not is_tied:
            infos[name] = TensorInfo(name, "F16", opened.tensors.tensors[name].shape, "")
    for layer, (n, k) in opened.model.linears.items():
        for leaf, (dtype, shape) in _leaves(opened.kind, n, k).items():
            infos[f"{layer}.{leaf}"] = TensorInfo(f"{layer}.{leaf}", dtype, tuple(shape), "")
    return infos


def _leaves(kind: Kind, n: int, k: int) -> dict[str, tuple[str, list[int]]]:
    if kind == "w8a8":
        return {"weight": ("I8", [n, k]), "weight_scale": ("F32", [n, 1])}
    return _qoq_set(kind).tensors(n, k)


def _qoq_set(kind: Kind) -> QoQSet:
    return QoQSet.model_validate(
        {"group_size": detect.GROUP_SIZE_OF.get(kind, -1), "ignore": ["lm_head"]}
    )
