"""Rows of a quantized weight as float32, whatever the method that stored them.

This is for comparing sets and not fast. Rows are asked for in chunks, so that memory stays
bounded by the chunk. The layouts are in `layout`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vllm_qoq.checkpoint.format import QoQSet
from vllm_qoq.checkpoint.layout import Layout
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.errors import FormatError
from vllm_qoq.numerics import reference

# AutoAWQ stores the columns of eight values in this order, from the low nibble up.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_CHUNK_VALUES = 4 << 20


def row_chunks(layout: Layout) -> Iterator[tuple[int, int]]:
    """Cut the rows of a weight into (start, stop), each a multiple of 32 or the end."""
    step = max(32, _CHUNK_VALUES // max(1, layout.in_features) // 32 * 32)
    for start in range(0, layout.out_features, step):
        yield start, min(start + step, layout.out_features)


def dequantize(weights: StoredSet, layer: str, rows: tuple[int, int]) -> torch.Tensor:
    """Dequantize the rows `rows`, one of `row_chunks`, of a layer: float32 [rows, in_features]."""
    read = _Reader(weights, layer)
    layout = weights.describe(layer)
    if layout.method == "plain":
        return read("weight")[slice(*rows)].float()
    if layout.method == "dense":
        return _dense(read, layout, rows)
    if layout.method == "packed":
        return _packed(read, layout, rows)
    if layout.method == "gptq":
        # Version 1 of the format stores each zero point less one.
        is_v2 = weights.config.get("checkpoint_format") == "gptq_v2"
        return _gptq(read, layout, rows, 0 if is_v2 else 1)
    if layout.method in ("qoq", "residual"):
        return reference.dequantize(qoq_tensors(weights, layer, rows))
    return _awq(read, layout, rows)


def qoq_tensors(weights: StoredSet, layer: str, rows: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Read the rows `rows` of every tensor of a layer of a QoQ set, by leaf.

    A nested set has the tensors of its base and its own. Raises FormatError for a layer that the
    base does not have in the same size.
    """
    layout, read = weights.describe(layer), _Reader(weights, layer)
    if weights.base is not None:
        if layer not in weights.base.quantized or weights.base.size(layer) != weights.size(layer):
            raise FormatError(f"{layer}: {weights.base.name} does not have it in this size")
        return {
            **qoq_tensors(weights.base, layer, rows),
            "qresidual": read("qresidual")[slice(*rows)],
        }
    leaves = QoQSet.parse(weights.config, weights.name).tensors(
        layout.out_features, layout.in_features
    )
    return {leaf: read(leaf)[slice(*rows)] for leaf in leaves}


class _Reader:
    """A reader of the tensors of one layer, by leaf."""

    def __init__(self, weights: StoredSet, layer: str) -> None:
        self._weights, self._layer = weights, layer

    def __call__(self, leaf: str) -> torch.Tensor:
        return self._weights.get(f"{self._layer}.{leaf}")

    def has(self, leaf: str) -> bool:
        """Whether the layer has the tensor."""
        return leaf in self._weights.layers[self._layer]


def _dense(read: _Reader, layout: Layout, rows: tuple[int, int]) -> torch.Tensor:
    weight = read("weight")[slice(*rows)].float()
    scale = read("weight_scale" if read.has("weight_scale") else "weight_scale_inv").float()
    if read.has("weight_zero_point"):
        weight -= _spread(read("weight_zero_point").float(), layout, rows)
    return weight * _spread(scale, layout, rows)


def _spread(scale: torch.Tensor, layout: Layout, rows: tuple[int, int]) -> torch.Tensor:
    """Spread the scales of blocks over the rows `rows`: [rows, K] or [rows, 1]."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    block_rows, block_columns = layout.block
    scale = scale.reshape(len(scale), -1)
    scale = scale[torch.arange(*rows) // block_rows]
    if scale.shape[1] == 1:
        return scale
    return scale.repeat_interleave(block_columns, 1)[:, : layout.in_features]


def _packed(read: _Reader, layout: Layout, rows: tuple[int, int]) -> torch.Tensor:
    start, stop = rows
    codes = _unpack(read("weight_packed")[start:stop], layout.bits)
    scale = read("weight_scale")[start:stop].float()
    middle = 1 << (layout.bits - 1)  # Symmetric codes are stored with this offset.
    zero: torch.Tensor | float = float(middle)
    if read.has("weight_zero_point"):
        # Zero points are packed along the rows: 32 rows are `bits` words.
        words = read("weight_zero_point")[start * layout.bits // 32 : -(-stop * layout.bits // 32)]
        zero = _unpack(words.T, layout.bits).T[: stop - start]
    if read.has("weight_g_idx"):
        group = read("weight_g_idx").long()
    else:
        group = torch.arange(layout.in_features) // layout.block[1]
    zero = zero[:, group] if isinstance(zero, torch.Tensor) else zero
    return (codes[:, : layout.in_features] - zero) * scale[:, group]


def _gptq(read: _Reader, layout: Layout, rows: tuple[int, int], less: int) -> torch.Tensor:
    start, stop = rows
    codes = _unpack(read("qweight")[:, start:stop].T, layout.bits)
    words = slice(start * layout.bits // 32, -(-stop * layout.bits // 32))
    zeros = _unpack(read("qzeros")[:, words], layout.bits)[:, : stop - start] + less
    scales = read("scales")[:, start:stop].float()
    if read.has("g_idx"):
        group = read("g_idx").long()
    else:
        group = torch.arange(layout.in_features) // layout.block[1]
    return (codes - zeros.T[:, group]) * scales.T[:, group]


def _awq(read: _Reader, layout: Layout, rows: tuple[int, int]) -> torch.Tensor:
    start, stop = rows
    words = slice(start * layout.bits // 32, -(-stop * layout.bits // 32))
    # Nibble i of a word is column order[i]; the inverse puts the columns in sequence.
    pack = 32 // layout.bits
    order = torch.tensor(_AWQ_ORDER if pack == 8 else range(pack)).argsort()

    def columns(name: str) -> torch.Tensor:
        codes = _unpack(read(name)[:, words], layout.bits)
        codes = codes.reshape(len(codes), -1, pack)[:, :, order]
        return codes.reshape(len(codes), -1)[:, : stop - start].T

    group = torch.arange(layout.in_features) // layout.block[1]
    scales = read("scales")[:, start:stop].float().T
    return (columns("qweight") - columns("qzeros")[:, group]) * scales[:, group]


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack codes from the low bits up: int32 [R, W] to float32 [R, W * 32 / bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (words.contiguous()[:, :, None] >> shifts) & ((1 << bits) - 1)
    return codes.reshape(len(words), -1).float()
