"""Numbers that no quantizer writes: NaN, infinity, scales that are not positive, int8 overflow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from merge_tools.layout import FLOATS, FP8
from merge_tools.sources import WeightSet
from vllm_qoq.checkpoint import Checkpoint, TensorInfo
from vllm_qoq.format import FormatError, split_layer

if TYPE_CHECKING:
    import torch

_CHUNK_VALUES = 4 << 20
_SCALES = frozenset(
    {
        *("weight_scale", "weight_scale_inv", "weight_global_scale", "scales"),
        *("input_scale", "input_global_scale", "channel_scale"),
    }
)


def finding(checkpoint: Checkpoint, info: TensorInfo) -> str | None:
    """What is wrong with the values of a tensor, or None. Reads it in chunks."""
    if info.dtype not in FLOATS | FP8:
        return None
    must_be_positive = split_layer(info.name)[1] in _SCALES
    for values in _chunks(checkpoint.get(info.name)):
        if not values.isfinite().all():
            return f"{info.file}: {info.name}: holds NaN or infinity; quantize the model again"
        if must_be_positive and not (values > 0).all():
            return (
                f"{info.file}: {info.name}: holds a scale that is not positive; "
                "quantize the model again"
            )
    return None


def layer_finding(weights: WeightSet, layer: str) -> str | None:
    """What is wrong with the integers of a layer of a QoQ set, or None. Reads it in chunks.

    A layer whose headers are wrong is left to `complete`.
    """
    from merge_tools.dequantize import qoq_tensors, row_chunks
    from vllm_qoq.reference import int8_weight

    try:
        for rows in row_chunks(weights.describe(layer)):
            int8_weight(qoq_tensors(weights, layer, rows))
    except FormatError:
        return None
    except ValueError as error:
        leaf, _, problem = str(error).partition(": ")
        info = weights.layers[layer].get(leaf)
        if info is None:  # the base's, and reported with it
            return None
        return f"{info.file}: {info.name}: {problem}; quantize the model again"
    return None


def limit_share(weights: WeightSet) -> float:
    """Share of a nested set's weights whose residual is 0 or 15, or whose W8 is -128 or 127."""
    from merge_tools.dequantize import qoq_tensors, row_chunks
    from vllm_qoq.packing import unpack_nibbles
    from vllm_qoq.reference import int8_weight

    at_limit = count = 0
    for layer in sorted(weights.quantized):
        for rows in row_chunks(weights.describe(layer)):
            tensors = qoq_tensors(weights, layer, rows)
            residual, weight = unpack_nibbles(tensors["qresidual"]), int8_weight(tensors)
            is_last = (residual == 0) | (residual == 15) | (weight == -128) | (weight == 127)
            at_limit, count = at_limit + int(is_last.sum()), count + is_last.numel()
    return at_limit / max(count, 1)


def check(checkpoint: Checkpoint, info: TensorInfo) -> None:
    """Raise FormatError with the finding, if there is one."""
    if message := finding(checkpoint, info):
        raise FormatError(f"{checkpoint.path}: {message}")


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK_VALUES):
        yield flat[start : start + _CHUNK_VALUES].float()
