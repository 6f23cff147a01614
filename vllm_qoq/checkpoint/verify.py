"""Checks that a checkpoint of ours is whole and sane: the command `verify`, and after writing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from vllm_qoq.checkpoint import (
    complete,
    hub,
    k_mean,
    processor,
    stream,
    towers,
    transforms,
    values,
)
from vllm_qoq.checkpoint import layer_rules as rules
from vllm_qoq.checkpoint.folder import Checkpoint, TensorInfo
from vllm_qoq.checkpoint.format import (
    INPUT_RATIO,
    INT8_HEAD_TENSORS,
    QUANT_METHOD,
    SECTION,
    KVSection,
    Section,
    split_layer,
    split_name,
)
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.errors import FormatError, shown
from vllm_qoq.models.config import CONFIG
from vllm_qoq.models.names import LM_HEAD, experts_of, split_expert
from vllm_qoq.models.table import architecture_of
from vllm_qoq.models.vision import vision_language
from vllm_qoq.progress import Progress


@dataclass(frozen=True)
class Verified:
    """The result of `verify`.

    findings      what is wrong, a line each; empty where all is well
    limit_shares  nested set -> share of its weights at the limit of what a residual can add
    notes         what could not be checked, a sentence each
    """

    findings: tuple[str, ...]
    limit_shares: Mapping[str, float]
    notes: tuple[str, ...]


def verify(folder: str | Path, quiet: bool = True) -> Verified:
    """Check a checkpoint of ours: every tensor is there, of the right shape, finite and sane.

    folder  the checkpoint's folder, or its id on the Hugging Face Hub, which is downloaded first
    quiet   print no progress

    Reads everything. Raises FormatError for a folder that is no checkpoint of ours, and HubError
    for an id that cannot be downloaded.
    """
    path = hub.local_folder(folder, quiet=quiet)
    # What transformers is asked to build is described by a config that fits its language model.
    findings = structure(path) or [*towers.findings(Checkpoint.open(path))]
    findings += contents(path, Progress(quiet))
    shares = {} if findings else limits(path)
    return Verified(tuple(findings), shares, tuple(notes(path)))


def open_merged(folder: Path) -> tuple[Checkpoint, Section | KVSection, list[StoredSet]]:
    """Open a vllm-qoq checkpoint as its sets, each with the shared tensors.

    A model of which only the KV cache is quantized is one set without a name.
    """
    checkpoint = Checkpoint.open(folder)
    section = checkpoint.section
    if isinstance(section, KVSection):
        return checkpoint, section, [StoredSet("", checkpoint, {}, checkpoint.tensors)]
    if section is None:
        raw = checkpoint.config.get(SECTION)
        method = raw.get("quant_method") if isinstance(raw, dict) else raw
        raise FormatError(
            f"{folder}: {CONFIG}: {SECTION}: quant_method is {shown(method)}, not "
            f"{QUANT_METHOD!r}, so this is not a vllm-qoq checkpoint; give a folder that quantize, "
            "merge, import or calibrate-kv made"
        )
    owned: dict[str | None, dict[str, TensorInfo]] = {name: {} for name in (None, *section.sets)}
    for name, info in checkpoint.tensors.items():
        owner, tensor = split_name(name, section.sets)
        owned[owner][tensor] = info
    shared = frozenset({LM_HEAD}) if section.lm_head is not None else frozenset[str]()
    sets = {
        name: StoredSet(
            name, checkpoint, config, {**owned[None], **owned[name]}, shared_layers=shared
        )
        for name, config in section.sets.items()
    }
    for name, weights in sets.items():
        base = section.base_of(name)
        if base is not None:
            sets[name] = replace(weights, base=sets[base])
    return checkpoint, section, list(sets.values())


def structure(folder: Path) -> list[str]:
    """Find what is wrong with names, dtypes, shapes and processor. Reads headers only."""
    checkpoint, section, sets = open_merged(folder)
    lacks = processor.finding(folder, checkpoint.config)
    found = [lacks] if lacks else []
    if isinstance(section, KVSection):
        found += [f for weights in sets for f in complete.findings(weights)]
        return [*found, *k_mean.structure(checkpoint, section.kv_cache)]
    head = _int8_head(checkpoint) if section.lm_head is not None else ()
    return [
        *found,
        *head,
        *stream.structure(checkpoint, section),
        *transforms.structure(checkpoint),
        *k_mean.structure(checkpoint, section.kv_cache),
        *_structure(section, sets),
    ]


def contents(folder: Path, progress: Progress) -> list[str]:
    """Find what is wrong with the values. Reads every tensor."""
    checkpoint, section, sets = open_merged(folder)
    found = []
    with progress.stage("verify", checkpoint.total_bytes) as advance:
        for info in checkpoint.tensors.values():
            message = values.finding(checkpoint, info)
            found += [message] if message else []
            advance(info.nbytes)
    if isinstance(section, Section):
        found += [*stream.contents(checkpoint, section), *transforms.contents(checkpoint)]
    return found + [f for weights in sets for f in values.set_findings(weights)]


def notes(folder: Path) -> list[str]:
    """Say what could not be checked, a sentence each."""
    checkpoint, _, _ = open_merged(folder)
    if vision_language(checkpoint.config) is not None:
        if towers.can_be_checked(checkpoint):
            return []
        return [
            "what reads images was checked for numbers that are not finite, and for no more; a "
            f"transformers that has the model compares it with {CONFIG}: install one"
        ]
    if architecture_of(checkpoint.config) is not None:
        return []
    names = shown(checkpoint.config.get("architectures"))
    return [
        f"{CONFIG}: architectures: {names}: not an architecture "
        "whose every tensor is known; sizes that its config does not tell were checked for "
        "consistency between layers and sets only"
    ]


def limits(folder: Path) -> dict[str, float]:
    """Map each nested set to the share of its weights at the limit of what a residual can add.

    Clipped weights are among these. The checkpoint must have no findings. Reads the nested sets
    and their bases.
    """
    _, _, sets = open_merged(folder)
    return {weights.name: values.limit_share(weights) for weights in sets if weights.base}


def _structure(section: Section, sets: list[StoredSet]) -> Iterator[str]:
    for weights in sets:
        for finding in complete.findings(weights):
            yield f"set {weights.name}: {finding}"
        yield from _ratios(section, weights)
        yield from _residuals(weights)
    quantized = frozenset().union(*(weights.quantized for weights in sets))
    floats = _float_experts(section, sets)
    yield from _same_layers(sets, quantized | floats)
    yield from _unlisted_experts(sets, quantized | floats)
    for glob in section.float_experts:
        if not any(fnmatchcase(name, glob) for name in experts_of(floats)):
            yield f"{CONFIG}: {SECTION}.float_experts: {shown(glob)} matches no experts in float"
    for glob in rules.unmatched(section.routing, quantized | floats):
        yield f"{CONFIG}: {SECTION}.routing.layers: {shown(glob)} matches no quantized layer"


def _int8_head(checkpoint: Checkpoint) -> Iterator[str]:
    tensors = [checkpoint.tensors.get(f"{LM_HEAD}.{leaf}") for leaf in INT8_HEAD_TENSORS]
    for info, leaf, dtype, columns in zip(
        tensors, INT8_HEAD_TENSORS, ("I8", "F32"), (None, 1), strict=True
    ):
        if info is None:
            yield f"{LM_HEAD}.{leaf}: {CONFIG} announces an int8 {LM_HEAD}, but it is missing"
        elif info.dtype != dtype or len(info.shape) != 2 or columns not in (None, info.shape[1]):
            shape = "[V, 1]" if columns else "[V, K]"
            yield (
                f"{info.file}: {info.name}: is {info.dtype} {list(info.shape)}, expected "
                f"{dtype} {shape}"
            )
    weight, scale = tensors
    if weight is not None and scale is not None and weight.shape[:1] != scale.shape[:1]:
        yield (
            f"{scale.file}: {scale.name}: has {scale.shape[0]} rows, the weight {weight.shape[0]}"
        )


def _residuals(weights: StoredSet) -> Iterator[str]:
    """Find layers of a nested set that do not fit those of its base."""
    if weights.base is None:
        return
    for layer in sorted(weights.base.quantized - weights.quantized):
        yield f"{weights.name}.{layer}.qresidual: missing, {weights.base.name} has this layer"
    for layer in sorted(weights.base.quantized & weights.quantized):
        try:
            n, k = weights.base.size(layer)
            is_same = weights.size(layer) == (n, k)
        except FormatError:  # reported with the layer
            continue
        if not is_same:
            info = weights.layers[layer]["qresidual"]
            yield (
                f"{info.file}: {info.name}: is {info.dtype} {list(info.shape)}, expected U8 "
                f"{[n, k // 2]} for the layer of {weights.base.name}; quantize the model again"
            )


def _ratios(section: Section, weights: StoredSet) -> Iterator[str]:
    globs = section.input_ratio.get(weights.name, ())
    listed = {x for x in weights.layers if any(fnmatchcase(x, glob) for glob in globs)}
    for layer in sorted(listed & weights.quantized):
        info = weights.tensors.get(f"{layer}.{INPUT_RATIO}")
        if info is None:
            yield f"{weights.name}.{layer}.{INPUT_RATIO}: listed in {CONFIG} but missing"
            continue
        try:
            size = weights.describe(layer).in_features
        except FormatError:  # reported with the layer
            continue
        if (info.dtype, info.shape) != ("F32", (size,)):
            yield (
                f"{info.file}: {info.name}: is {info.dtype} {list(info.shape)}, "
                f"expected F32 [{size}]"
            )
    for tensor, info in weights.tensors.items():
        layer, leaf = split_layer(tensor)
        if leaf == INPUT_RATIO and layer not in listed:
            yield f"{info.file}: {info.name}: is not listed in {CONFIG}: {SECTION}.{INPUT_RATIO}"


def _float_experts(section: Section, sets: list[StoredSet]) -> frozenset[str]:
    """Find the layers of experts that no set quantizes and each has to have for itself."""
    layers = frozenset().union(*(weights.layers for weights in sets))
    listed = {name for name in experts_of(layers) if section.has_float_experts(name)}
    places = {layer: split_expert(layer) for layer in layers}
    return frozenset(layer for layer, place in places.items() if place and place[0] in listed)


def _unlisted_experts(sets: list[StoredSet], own: frozenset[str]) -> Iterator[str]:
    """Find experts in float that a set has for itself, of which the config says nothing."""
    for weights in sets:
        for layer, leaves in weights.layers.items():
            if layer in own or split_expert(layer) is None:
                continue
            for info in leaves.values():
                if _is_own(info, weights.name):
                    yield (
                        f"{info.file}: {info.name}: no set quantizes these experts, and "
                        f"{CONFIG}: {SECTION}.float_experts does not list them"
                    )


def _same_layers(sets: list[StoredSet], per_set: frozenset[str]) -> Iterator[str]:
    """Find layers that sets have for themselves and one of them has no tensors of its own for."""
    for weights in sets:
        for layer in sorted(per_set):
            if not any(_is_own(info, weights.name) for info in _leaves(weights, layer).values()):
                yield f"{weights.name}.{layer}: missing, another set has this layer"


def _leaves(weights: StoredSet, layer: str) -> Mapping[str, TensorInfo]:
    return weights.layers.get(layer, {})


def _is_own(info: TensorInfo, set_name: str) -> bool:
    return info.name.startswith(f"{set_name}.")
