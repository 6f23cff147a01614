"""Where q, k, v, gate and up are: whole layers, or rows of one that does the work of several."""

from __future__ import annotations

from typing import Literal

from vllm_qoq.models.table import LayerNames
from vllm_qoq.quantizer.model import Dimensions, Module
from vllm_qoq.quantizer.weights import Rows

Part = Literal["q", "k", "v", "gate", "up"]

# The parts that may be fused into one layer, in the order of their rows there.
_FUSABLE: tuple[tuple[Part, ...], ...] = (("q", "k", "v"), ("gate", "up"))


def part_rows(part: Part, names: LayerNames, dimensions: Dimensions) -> tuple[int, int]:
    """Find the rows, first and last + 1, of a part in the layer that has it."""
    sizes = {
        "q": dimensions.heads * dimensions.head_dim,
        **dict.fromkeys(("k", "v"), dimensions.kv_heads * dimensions.head_dim),
        **dict.fromkeys(("gate", "up"), dimensions.inner),
    }
    group = next(group for group in _FUSABLE if part in group)
    layer = getattr(names, part)
    before = [one for one in group[: group.index(part)] if getattr(names, one) == layer]
    start = sum(sizes[one] for one in before)
    return start, start + sizes[part]


def rows(block: Module, part: Part, names: LayerNames, dimensions: Dimensions) -> Rows:
    """Find a part of a block."""
    start, stop = part_rows(part, names, dimensions)
    return Rows(block.get_submodule(getattr(names, part)), start, stop)
