"""Checks of how many GPUs vLLM can split the layers of a checkpoint over. No tensor is read.

vLLM cuts a column-parallel layer (q, k, v, gate, up) along its outputs and a
row-parallel one (o, down) along its inputs. So it cuts linear attention, between its heads of K
with the heads of V that belong to each, and experts, unless expert parallelism shares
them out whole. A cut must not go through a head, a group or block that shares a scale, or a word of
packed codes, and has to leave QoQ experts of the sizes that their kernels take. Where there are
fewer K and V heads than GPUs, each GPU gets a copy of one. The hidden size is never cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_qoq.checkpoint.layout import Layout
from vllm_qoq.models.config import text_config
from vllm_qoq.models.names import split_expert
from vllm_qoq.numerics import EXPERT_MULTIPLE

SIZES = (1, 2, 4, 8, 16)

_QUERY = frozenset({"q_proj", "o_proj"})
_KEY_VALUE = frozenset({"k_proj", "v_proj"})
_MLP = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
_FUSED = frozenset({"qkv_proj", "gate_up_proj"})
_ROW_PARALLEL = frozenset({"o_proj", "down_proj", "w2"})
_QOQ = ("qoq", "residual")
_WORD_BITS = 32
_UNKNOWN_HEADS = "config.json: num_attention_heads or num_key_value_heads: not a count"


@dataclass(frozen=True, slots=True)
class HeadCounts:
    """The numbers of query heads and of key-value heads of the model.

    linear  the heads of K of its linear attention; None without it
    """

    query: int
    key_value: int
    linear: int | None = None


def obstacles(
    config: Mapping[str, Any], sets: Mapping[str, Mapping[str, Layout]]
) -> dict[int, str | None]:
    """Map each of `SIZES` to why vLLM cannot split the layers over so many GPUs; None if it can.

    On one GPU there is an obstacle only where nothing computes the layers at all.

    `config` is the `config.json`; `sets` maps a set to its quantized layers.
    """
    try:
        heads = _heads(config)
    except (KeyError, TypeError, ValueError, OverflowError):  # also Infinity
        return {size: None if size == 1 else _UNKNOWN_HEADS for size in SIZES}
    return {size: _obstacle(heads, sets, size) for size in SIZES}


def _heads(config: Mapping[str, Any]) -> HeadCounts:
    text = text_config(config)
    query = int(text["num_attention_heads"])
    linear = text.get("linear_num_key_heads")
    heads = HeadCounts(
        query,
        int(text.get("num_key_value_heads") or query),
        None if linear is None else int(linear),
    )
    if min(heads.query, heads.key_value, heads.linear or 1) < 1:
        raise ValueError("no heads")
    return heads


def _obstacle(heads: HeadCounts, sets: Mapping[str, Mapping[str, Layout]], size: int) -> str | None:
    if heads.query % size:
        return f"{heads.query} attention heads are not a multiple of {size}"
    more, fewer = max(heads.key_value, size), min(heads.key_value, size)
    if more % fewer:
        return f"{heads.key_value} key-value heads cannot be shared out over {size}"
    if heads.linear is not None and heads.linear % size:
        return f"{heads.linear} heads of linear attention are not a multiple of {size}"
    for name, layers in sets.items():
        for layer, layout in layers.items():
            if reason := _layer_obstacle(layer, layout, heads, size):
                return f"{name}.{layer}: {reason}"
    return None


def _layer_obstacle(layer: str, layout: Layout, heads: HeadCounts, size: int) -> str | None:
    leaf = layer.rpartition(".")[2]
    if layout.method in _QOQ and split_expert(layer) is not None:
        return _expert_obstacle(leaf, layout, size)
    if size == 1:
        return None
    if leaf in _FUSED:
        return _fused_obstacle(leaf, layout, heads, size)
    if heads.linear is not None and layer.rpartition(".")[0].endswith(".linear_attn"):
        return _linear_obstacle(leaf, layout, heads, size)
    if leaf not in _QUERY | _KEY_VALUE | _MLP:
        return "not known how vLLM splits this layer"
    if leaf in _ROW_PARALLEL:
        return _cut(layout.in_features, size, _column_unit(layout), "inputs")
    parts = min(size, heads.key_value) if leaf in _KEY_VALUE else size
    return _cut(layout.out_features, parts, _row_unit(layout), "outputs")


def _expert_obstacle(leaf: str, layout: Layout, size: int) -> str | None:
    """Say why the kernels do not compute the slices of a QoQ expert; None if they do."""
    parts = {"outputs": size, "inputs": 1}
    if leaf in _ROW_PARALLEL:
        parts = {"outputs": 1, "inputs": size}
    lengths = {"outputs": layout.out_features, "inputs": layout.in_features}
    for what, length in lengths.items():
        if length % EXPERT_MULTIPLE:
            return f"{length} {what} of a QoQ expert are not a multiple of {EXPERT_MULTIPLE}"
        if reason := _cut(length, parts[what], EXPERT_MULTIPLE, what):
            return f"{reason}; --enable-expert-parallel leaves experts whole"
    return None


def _fused_obstacle(leaf: str, layout: Layout, heads: HeadCounts, size: int) -> str | None:
    """Say why one of the layers that are fused on disk, and that vLLM cuts apart, cannot be cut."""
    rows, unit = layout.out_features, _row_unit(layout)
    if leaf == "gate_up_proj":
        return _cut(rows // 2, size, unit, "outputs of gate and of up")
    head = rows // (heads.query + 2 * heads.key_value)
    return _cut(heads.query * head, size, unit, "outputs of q") or _cut(
        heads.key_value * head, min(size, heads.key_value), unit, "outputs of k and of v"
    )


def _linear_obstacle(leaf: str, layout: Layout, heads: HeadCounts, size: int) -> str | None:
    """Say why a layer of linear attention cannot be cut: its units stay together in each head."""
    assert heads.linear is not None
    if leaf == "out_proj":
        return _cut(layout.in_features, size, _column_unit(layout), "inputs")
    return _cut(layout.out_features, size, _row_unit(layout), "outputs")


def _cut(length: int, parts: int, unit: int, what: str) -> str | None:
    """Say why `length` cannot be cut into `parts` of whole `unit`s; None if it can."""
    if length % parts:
        return f"{length} {what} cannot be split by {parts}"
    if length // parts % unit:
        return f"{length} {what} split by {parts} are {length // parts}, not a multiple of {unit}"
    return None


def _column_unit(layout: Layout) -> int:
    """Count the inputs that have to stay together: a group, and the codes of one word.

    Ranks with a QoQ set may share a group, but not a byte.
    """
    if layout.method in _QOQ:
        return 2
    group = layout.group_size or 1
    is_packed = layout.method in ("packed", "gptq")
    return math.lcm(group, _WORD_BITS // layout.bits) if is_packed else group


def _row_unit(layout: Layout) -> int:
    """Count the outputs that have to stay together: a block, and the codes of one word."""
    rows = layout.block[0]
    block = rows if rows < layout.out_features else 1
    is_packed = layout.method in ("gptq", "awq")
    return math.lcm(block, _WORD_BITS // layout.bits) if is_packed else block
