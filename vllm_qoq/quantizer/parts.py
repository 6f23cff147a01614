"""Where q, k, v, gate and up are: whole layers, or rows of one that does the work of several."""

from __future__ import annotations

from typing import Literal

from vllm_qoq.models.blocks import Mlp
from vllm_qoq.models.table import LayerNames
from vllm_qoq.quantizer.model import Dimensions, Module
from vllm_qoq.quantizer.weights import Rows

Part = Literal["q", "k", "v"]

_ORDER: tuple[Part, ...] = ("q", "k", "v")


def part_rows(part: Part, names: LayerNames, dimensions: Dimensions) -> tuple[int, int]:
    """Find the rows, first and last + 1, of a part of attention in the layer that has it."""
    heads = {"q": dimensions.heads, "k": dimensions.kv_heads, "v": dimensions.kv_heads}
    layer = getattr(names, part)
    before = [one for one in _ORDER[: _ORDER.index(part)] if getattr(names, one) == layer]
    start = sum(heads[one] for one in before)
    return start * dimensions.head_dim, (start + heads[part]) * dimensions.head_dim


def rows(block: Module, part: Part, names: LayerNames, dimensions: Dimensions) -> Rows:
    """Find a part of the attention of a block."""
    start, stop = part_rows(part, names, dimensions)
    return Rows(block.get_submodule(getattr(names, part)), start, stop)


def gate_and_up(block: Module, mlp: Mlp) -> tuple[Rows, Rows]:
    """Find gate and up of an MLP of a block."""
    gate, up = (block.get_submodule(name) for name in (mlp.gate, mlp.up))
    if gate is not up:
        return Rows(gate, 0, len(gate.weight)), Rows(up, 0, len(up.weight))
    half = len(gate.weight) // 2
    return Rows(gate, 0, half), Rows(gate, half, 2 * half)
