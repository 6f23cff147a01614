"""Checks for numbers that no quantizer writes: NaN, infinity, wrong scales, int8 overflow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm_qoq.checkpoint import sizes
from vllm_qoq.checkpoint.folder import Checkpoint, TensorInfo
from vllm_qoq.checkpoint.format import K_MEAN, QOQ_LINEAR, QOQ_RESIDUAL, split_layer
from vllm_qoq.checkpoint.language import language_set
from vllm_qoq.checkpoint.layout import FLOATS, FP8
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.errors import FormatError
from vllm_qoq.models.config import CONFIG
from vllm_qoq.models.tensors import EMBEDDING, HEAD
from vllm_qoq.numerics import FP16_MAX

if TYPE_CHECKING:
    import torch

_REMEDY = "quantize the model again"
_CHUNK_VALUES = 4 << 20
_NUMBERS = FLOATS | FP8 | {"F64"}
_SCALES = frozenset(
    {
        *("weight_scale", "weight_scale_inv", "weight_global_scale", "scales"),
        *("input_scale", "input_global_scale", "channel_scale"),
    }
)


def finding(checkpoint: Checkpoint, info: TensorInfo) -> str | None:
    """Find what is wrong with the values of a tensor, or None. Reads it in chunks."""
    if info.dtype not in _NUMBERS:
        return None
    leaf = split_layer(info.name)[1]
    for values in _chunks(checkpoint.get(info.name)):
        if not values.isfinite().all():
            return f"{info.file}: {info.name}: holds NaN or infinity; {_REMEDY}"
        if leaf in _SCALES and not (values > 0).all():
            return f"{info.file}: {info.name}: holds a scale that is not positive; {_REMEDY}"
        if leaf == K_MEAN and (values.abs() > FP16_MAX).any():
            return (
                f"{info.file}: {info.name}: holds {float(values.abs().max()):g}, beyond the "
                f"{FP16_MAX:g} of 16-bit floats, in which keys are served; {_REMEDY}"
            )
    return None


def set_findings(weights: StoredSet) -> Iterator[str]:
    """Find what is wrong with the values of a set beyond single tensors. Reads those that matter.

    These are integers out of range, biases that the model does not have, and an lm_head that
    differs from the embedding it is tied to.
    """
    if weights.config.get("quant_method") in (QOQ_LINEAR, QOQ_RESIDUAL):
        found = (layer_finding(weights, layer) for layer in sorted(weights.quantized))
        yield from (message for message in found if message)
    for layer in sorted(weights.quantized):
        yield from _index_findings(weights, layer)
    weights = language_set(weights)
    for name in sizes.surplus_biases(weights):
        if bool(weights.get(name).any()):
            yield (
                f"{weights.tensors[name].file}: {weights.tensors[name].name}: is not zero, but the "
                f"model that {CONFIG} describes has no such bias; {_REMEDY}"
            )
    if sizes.has_tied_copy(weights) and not _is_copy(weights, HEAD, EMBEDDING):
        yield (
            f"{weights.tensors[HEAD].file}: {weights.tensors[HEAD].name}: differs from "
            f"{weights.tensors[EMBEDDING].name}, but {CONFIG} says "
            f"tie_word_embeddings, so vLLM would not use it; remove it or mend {CONFIG}"
        )


def check_set(weights: StoredSet) -> None:
    """Raise FormatError with the first of the `set_findings`, if there is one."""
    for message in set_findings(weights):
        raise FormatError(f"{weights.checkpoint.path}: {message}")


def layer_finding(weights: StoredSet, layer: str) -> str | None:
    """Find what is wrong with the integers of a layer of a QoQ set, or None. Reads it in chunks.

    A layer whose headers are wrong is left to `complete`.
    """
    from vllm_qoq.checkpoint.dequantize import qoq_tensors, row_chunks
    from vllm_qoq.numerics.reference import int8_weight

    try:
        for rows in row_chunks(weights.describe(layer)):
            int8_weight(qoq_tensors(weights, layer, rows))
    except FormatError:
        return None
    except ValueError as error:
        leaf, _, problem = str(error).partition(": ")
        info = weights.layers[layer].get(leaf)
        if info is None:  # It is a tensor of the base, and reported with that.
            return None
        return f"{info.file}: {info.name}: {problem}; {_REMEDY}"
    return None


def _index_findings(weights: StoredSet, layer: str) -> Iterator[str]:
    """Find groups and sizes that a layer stores as numbers and that its tensors do not have."""
    leaves = weights.layers[layer]
    try:
        layout = weights.describe(layer)
    except FormatError:  # reported with the layer
        return
    groups = -(-layout.in_features // layout.block[1])
    for leaf in ("g_idx", "weight_g_idx"):
        if leaf in leaves:
            low, high = (int(x) for x in weights.get(f"{layer}.{leaf}").aminmax())
            if low < -1 or high >= groups:  # -1 stands for no order.
                yield (
                    f"{leaves[leaf].file}: {leaves[leaf].name}: names the groups {low} to {high} "
                    f"of {groups}; {_REMEDY}"
                )
    if "weight_shape" in leaves and layout.method == "packed":
        found = [int(x) for x in weights.get(f"{layer}.weight_shape")]
        n, k = layout.out_features, layout.in_features
        if found[0] != n or not k - 32 // layout.bits < found[1] <= k:
            yield (
                f"{leaves['weight_shape'].file}: {leaves['weight_shape'].name}: says {found}, but "
                f"the weight is {[n, k]}; {_REMEDY}"
            )


def limit_share(weights: StoredSet) -> float:
    """The share of a nested set's weights whose residual is 0 or 15, or whose W8 is -128 or 127."""
    from vllm_qoq.checkpoint.dequantize import qoq_tensors, row_chunks
    from vllm_qoq.numerics.packing import unpack_nibbles
    from vllm_qoq.numerics.reference import int8_weight

    at_limit = count = 0
    for layer in sorted(weights.quantized):
        for rows in row_chunks(weights.describe(layer)):
            tensors = qoq_tensors(weights, layer, rows)
            residual, weight = unpack_nibbles(tensors["qresidual"]), int8_weight(tensors)
            is_last = (residual == 0) | (residual == 15) | (weight == -128) | (weight == 127)
            at_limit, count = at_limit + int(is_last.sum()), count + is_last.numel()
    return at_limit / max(count, 1)


def check(checkpoint: Checkpoint, info: TensorInfo) -> None:
    """Raise FormatError with the `finding` of a tensor, if there is one."""
    if message := finding(checkpoint, info):
        raise FormatError(f"{checkpoint.path}: {message}")


def _is_copy(weights: StoredSet, left: str, right: str) -> bool:
    a, b = weights.get(left), weights.get(right)
    return a.shape == b.shape and all(
        bool((x == y).all()) for x, y in zip(_chunks(a), _chunks(b), strict=True)
    )


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK_VALUES):
        yield flat[start : start + _CHUNK_VALUES].float()
