"""Is a merged checkpoint whole and sane? Used by `verify`, and by `merge` on what it wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from merge_tools import complete, rules, values
from merge_tools.progress import Progress
from merge_tools.sources import WeightSet
from vllm_qoq.checkpoint import CONFIG, Checkpoint, TensorInfo
from vllm_qoq.format import (
    INPUT_RATIO,
    QOQ_LINEAR,
    SECTION,
    FormatError,
    Section,
    split_layer,
    split_name,
)


def open_merged(folder: Path) -> tuple[Checkpoint, Section, list[WeightSet]]:
    """Open a vllm-qoq checkpoint as its sets, each with the shared tensors."""
    checkpoint = Checkpoint.open(folder)
    section = checkpoint.section
    if section is None:
        raise FormatError(f"{folder}: {CONFIG}: {SECTION}: this is not a vllm-qoq checkpoint")
    owned: dict[str | None, dict[str, TensorInfo]] = {name: {} for name in (None, *section.sets)}
    for name, info in checkpoint.tensors.items():
        owner, tensor = split_name(name, section.sets)
        owned[owner][tensor] = info
    sets = [
        WeightSet(name, checkpoint, config, {**owned[None], **owned[name]})
        for name, config in section.sets.items()
    ]
    return checkpoint, section, sets


def structure(folder: Path) -> list[str]:
    """What is wrong with names, dtypes and shapes; reads headers only."""
    _, section, sets = open_merged(folder)
    return list(_structure(section, sets))


def contents(folder: Path, progress: Progress) -> list[str]:
    """What is wrong with the values; reads every tensor."""
    checkpoint, _, sets = open_merged(folder)
    found = []
    with progress.stage("verify", checkpoint.total_bytes) as advance:
        for info in checkpoint.tensors.values():
            message = values.finding(checkpoint, info)
            found += [message] if message else []
            advance(info.nbytes)
    for weights in sets:
        if weights.config["quant_method"] == QOQ_LINEAR:
            messages = (values.layer_finding(weights, layer) for layer in sorted(weights.quantized))
            found += [message for message in messages if message]
    return found


def _structure(section: Section, sets: list[WeightSet]) -> Iterator[str]:
    for weights in sets:
        for finding in complete.findings(weights):
            yield f"set {weights.name}: {finding}"
        yield from _ratios(section, weights)
    yield from _same_layers(sets)
    quantized = frozenset().union(*(weights.quantized for weights in sets))
    for glob in rules.unmatched(section.routing, quantized):
        yield f"{CONFIG}: {SECTION}.routing.layers: {glob!r} matches no quantized layer"


def _ratios(section: Section, weights: WeightSet) -> Iterator[str]:
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


def _same_layers(sets: list[WeightSet]) -> Iterator[str]:
    """Every set has its own tensors for every layer that any set quantizes."""
    quantized = frozenset().union(*(weights.quantized for weights in sets))
    for weights in sets:
        for layer in sorted(quantized):
            if not any(_is_own(info, weights.name) for info in _leaves(weights, layer).values()):
                yield f"{weights.name}.{layer}: missing, another set has this layer"


def _leaves(weights: WeightSet, layer: str) -> Mapping[str, TensorInfo]:
    return weights.layers.get(layer, {})


def _is_own(info: TensorInfo, set_name: str) -> bool:
    return info.name.startswith(f"{set_name}.")
