"""Checks that the sets can share one KV cache: their keys and values must mean the same.

A rotation or a SmoothAttention scale on one side leaves that set right by itself
and changes no shape, so only the weights tell. Compared are the rows of k_proj and
v_proj, dequantized and with the norm before them folded into the columns:

    gain    <row, reference> / <reference, reference>
    cosine  cosine of the angle between row and reference

Rounding to 4 bits moves both a little: llmcompressor's W8A8 against its W4A16 of
tests/data/tiny-llama gives gains of 0.977 to 1.021 and cosines of 0.980 and more. A
change of basis moves many rows a lot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from merge_tools import MergeError
from vllm_qoq.checkpoint.dequantize import dequantize, row_chunks
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.errors import FormatError, shown
from vllm_qoq.models.config import text_config
from vllm_qoq.models.table import norm_offset

if TYPE_CHECKING:
    import torch

_KINDS = ("k_proj", "v_proj", "qkv_proj")
# A row that keeps its direction but not its length was scaled; noise does not do that.
_GAIN = (0.87, 1.15)
_SAME_DIRECTION = 0.9
# Single rows of honest 4-bit sets may be noisy; this share of a layer may not.
_LOST_COSINE = 0.8
_LOST_SHARE = 0.05


def check(reference: StoredSet, other: StoredSet) -> None:
    """Raise MergeError where the K or V of a layer of `other` is in another basis."""
    for layer in sorted(reference.layers):
        kind = layer.rpartition(".")[2]
        if kind in _KINDS and layer in other.layers:
            _check_layer(reference, other, layer, kind)


def statistics(
    reference: StoredSet, other: StoredSet, layer: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute gain and cosine of every row of `layer`: two tensors float32 [out_features]."""
    import torch

    gains, cosines = [], []
    for rows in row_chunks(reference.describe(layer)):
        ours, theirs = (_folded(weights, layer, rows) for weights in (reference, other))
        dot, square = (ours * theirs).sum(1), (ours * ours).sum(1)
        norms = square.sqrt() * theirs.norm(dim=1)
        dead = norms == 0
        gains.append(torch.where(dead, torch.ones_like(dot), dot / square))
        cosines.append(torch.where(dead, torch.ones_like(dot), dot / norms))
    return torch.cat(gains), torch.cat(cosines)


def _check_layer(reference: StoredSet, other: StoredSet, layer: str, kind: str) -> None:
    gain, cosine = statistics(reference, other, layer)
    rows = _cached_rows(reference.checkpoint.config, kind, len(gain))
    gain, cosine = gain[rows], cosine[rows]
    scaled = (cosine > _SAME_DIRECTION) & ((gain < _GAIN[0]) | (gain > _GAIN[1]))
    lost = cosine < _LOST_COSINE
    if scaled.any() or lost.float().mean() > _LOST_SHARE:
        row = int((scaled if scaled.any() else lost).nonzero()[0])
        raise MergeError(
            f"{layer}: row {rows.start + row} of {other.name} has gain {gain[row]:.2f} and cosine "
            f"{cosine[row]:.2f} against {reference.name}, so the sets' keys or values differ and "
            "cannot share a KV cache; quantize both from one model, with the same rotation and "
            "SmoothAttention"
        )


def _folded(weights: StoredSet, layer: str, rows: tuple[int, int]) -> torch.Tensor:
    """Rows of a weight with the norm before them folded in: float32 [rows, in_features]."""
    norm = f"{layer.partition('.self_attn.')[0]}.input_layernorm.weight"
    weight = dequantize(weights, layer, rows)
    if norm not in weights.tensors:
        return weight
    info = weights.tensors[norm]
    if info.shape != (weight.shape[1],):
        raise FormatError(
            f"{info.file}: {norm}: is {list(info.shape)}, but {layer} reads {weight.shape[1]} "
            "channels; download the model again"
        )
    return weight * (weights.get(norm).float() + norm_offset(weights.checkpoint.config))


def _cached_rows(config: Mapping[str, Any], kind: str, rows: int) -> slice:
    """The rows of K and V in a layer; a fused one begins with the queries."""
    if kind != "qkv_proj":
        return slice(0, rows)
    text = text_config(config)
    heads: Any = text.get("num_attention_heads")
    kv_heads: Any = text.get("num_key_value_heads") or heads
    if not (_is_count(heads, rows) and _is_count(kv_heads, rows)):
        raise FormatError(
            f"config.json: num_attention_heads, num_key_value_heads: {shown(heads)}, "
            f"{shown(kv_heads)} are no numbers of heads in {rows} rows of qkv_proj; download the "
            "config again"
        )
    return slice(rows * int(heads) // (int(heads) + 2 * int(kv_heads)), rows)


def _is_count(value: object, most: int) -> bool:
    return type(value) is int and 0 < value <= most


def biases(reference: StoredSet, other: StoredSet) -> Iterator[str]:
    """Find the K and V biases that differ by more than rounding, by tensor name."""
    import torch

    for tensor in reference.tensors:
        kind = tensor.removesuffix(".bias").rpartition(".")[2]
        if kind in _KINDS and tensor.endswith(".bias") and tensor in other.tensors:
            rows = _cached_rows(reference.checkpoint.config, kind, len(reference.get(tensor)))
            ours, theirs = (one.get(tensor)[rows].float() for one in (reference, other))
            if not torch.allclose(ours, theirs, rtol=0.05, atol=float(ours.abs().max()) * 0.01):
                yield tensor
