"""Names of layers: their place in the decoder, and which of them vLLM runs as one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

LM_HEAD = "lm_head"

Shard = TypeVar("Shard")

_LAYER = re.compile(r"(?P<prefix>(?:.*\.)?layers\.)(?P<index>\d+)\.(?P<module>.+)")
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<projection>[^.]+)")

FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""Projections that vLLM runs as one layer, under its name."""

# How many outputs of vLLM's layer one projection is, where that is not one: q, k and v.
_OUTPUTS = {"in_proj_qkv": 3}


def split_decoder(name: str) -> tuple[str, int, str] | None:
    """Split the name of a module of a decoder layer; None for a name outside of the decoder.

    `model.layers.3.mlp.up_proj` -> ("model.layers.", 3, "mlp.up_proj")
    """
    match = _LAYER.fullmatch(name)
    return (match["prefix"], int(match["index"]), match["module"]) if match else None


def split_expert(name: str) -> tuple[str, int, str] | None:
    """Split the name of a layer of an expert; None for any other.

    `model.layers.3.mlp.experts.7.up_proj` -> ("model.layers.3.mlp.experts", 7, "up_proj")
    """
    match = _EXPERT.fullmatch(name)
    return (match["experts"], int(match["number"]), match["projection"]) if match else None


def experts_of(names: Iterable[str]) -> frozenset[str]:
    """Find the mixtures of experts that layers with these `names` belong to."""
    return frozenset(place[0] for place in map(split_expert, names) if place is not None)


def shards_of_parts(
    parts: Sequence[str], shards: Iterable[Shard]
) -> list[tuple[str, tuple[Shard, ...]]]:
    """Share out the `shards` of a layer of vLLM among the layers that it is made of.

    parts  their names; where one layer does the work of all, it is one
    """
    left = tuple(shards)
    counts = [_OUTPUTS.get(part.rpartition(".")[2], 1) for part in parts]
    if sum(counts) != len(left):
        return [(parts[0], left)]
    found = []
    for part, count in zip(parts, counts, strict=True):
        found.append((part, left[:count]))
        left = left[count:]
    return found


def layer_globs(chosen: Iterable[str], every: Iterable[str]) -> tuple[str, ...]:
    """Find globs over layer names that match `chosen` and no other of `every`.

    They are like `model.layers.*.mlp.up_proj` where all indices are chosen, and names elsewhere.
    """
    chosen, every = set(chosen), set(every)
    by_glob: dict[str, set[str]] = {}
    for name in every:
        by_glob.setdefault(_glob(name), set()).add(name)
    globs = set()
    for name in chosen:
        glob = _glob(name)
        globs.add(glob if by_glob.get(glob, set()) <= chosen else _literal(name))
    return tuple(sorted(globs))


def _glob(name: str) -> str:
    place = split_decoder(name)
    if place is None:
        return _literal(name)
    prefix, _, module = place
    return f"{_literal(prefix)}*.{_literal(module)}"


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
