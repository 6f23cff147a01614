"""Nesting (`merge --nest`): an 8-bit set stored as a residual on a QoQ set.

    residual = round(W / channel_scale) - W4, clamped to -8..7

with W the weight of the set to nest, or of the float model, and W4 and channel_scale the base's.
Weights that were rounded to the nearest code of the base fit; those that GPTQ moved may not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from merge_tools import MergeError
from merge_tools.survey import Survey
from vllm_qoq.checkpoint.format import QOQ_LINEAR, QoQSet
from vllm_qoq.checkpoint.layout import Layout
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.progress import Progress

if TYPE_CHECKING:
    import torch

_REMEDY = "leave out --nest to store both sets whole"


def pair(sources: Sequence[StoredSet]) -> tuple[StoredSet, StoredSet]:
    """Find the set to nest and its base among the inputs, or raise MergeError. Reads no tensor."""
    bases = [source for source in sources if _is_base(source)]
    others = [source for source in sources if not _is_base(source)]
    if len(bases) != 1 or len(others) != 1:
        raise MergeError(
            f"--nest: takes one {QOQ_LINEAR} set with groups and one set of 8 bits or the "
            f"float model, but {', '.join(f'{s.name} is {_kind(s)}' for s in sources)}; {_REMEDY}"
        )
    (base,), (source,) = bases, others
    for layer in sorted(source.quantized - base.quantized):
        raise MergeError(f"{layer}: {base.name} does not quantize it; {_REMEDY}")
    for layer in sorted(base.quantized):
        layout = source.describe(layer)
        if not _is_source(layout):
            raise MergeError(
                f"{layer}: is {layout.bits} bits ({layout.method}) in {source.name}, but a nested "
                f"set is made of int8 with a scale per row or of floats; {_REMEDY}"
            )
    return source, base


def check_basis(found: Survey, source: StoredSet, base: StoredSet) -> None:
    """Raise MergeError for a tensor beside the quantized layers that is not the same in both.

    Experts that neither quantizes are among these: a nested set has none of its own.
    """
    for experts in sorted(found.float_experts):
        raise MergeError(
            f"{experts}: neither {source.name} nor {base.name} quantizes these experts, and they "
            f"differ, so they cannot nest; quantize both from one transformed model, or {_REMEDY}"
        )
    for tensor in found.unequal:
        raise MergeError(
            f"{tensor}: differs between {source.name} and {base.name}, whose weights therefore "
            f"cannot nest; quantize both from one transformed model, or {_REMEDY}"
        )


def clipped_shares(source: StoredSet, base: StoredSet, progress: Progress) -> dict[str, float]:
    """Map each layer to the share of its weights whose residual 4 bits do not hold.

    Reads both sets.
    """
    from vllm_qoq.checkpoint.dequantize import row_chunks

    shares = {}
    with progress.stage("nest", base.checkpoint.total_bytes) as advance:
        for layer in sorted(base.quantized):
            clipped = 0
            try:
                for rows in row_chunks(base.describe(layer)):
                    exact, stored = _residuals(source, base, layer, rows)
                    clipped += int((exact != stored).sum())
            except ValueError as error:
                raise MergeError(f"{base.name}.{layer}.{error}; quantize the model again") from None
            n, k = base.size(layer)
            shares[layer] = clipped / (n * k)
            advance(n * k // 2)
    return shares


def check_clipped(shares: dict[str, float], limit: float) -> None:
    """Raise MergeError if the clipped share of a layer is above `limit`."""
    worst = max(shares, key=shares.__getitem__, default=None)
    if worst is not None and shares[worst] > limit:
        raise MergeError(
            f"{worst}: {shares[worst]:.2%} of the residuals do not fit in 4 bits, more than "
            f"--max-clipped {limit:g}; make both sets with vllm-qoq quantize --nested, or {_REMEDY}"
        )


def residual(source: StoredSet, base: StoredSet, layer: str) -> torch.Tensor:
    """Compute the qresidual of `layer`: uint8 [N, K / 2], see `vllm_qoq.checkpoint.format`."""
    import torch

    from vllm_qoq.checkpoint.dequantize import row_chunks
    from vllm_qoq.numerics.packing import pack_nibbles
    from vllm_qoq.numerics.reference import RESIDUAL_ZERO

    chunks = row_chunks(base.describe(layer))
    stored = [_residuals(source, base, layer, rows)[1] for rows in chunks]
    return torch.cat([pack_nibbles((part + RESIDUAL_ZERO).to(torch.uint8)) for part in stored])


def _residuals(
    source: StoredSet, base: StoredSet, layer: str, rows: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residuals as they should be and as they can be stored: integers, float32 [rows, K]."""
    from vllm_qoq.checkpoint.dequantize import dequantize, qoq_tensors
    from vllm_qoq.numerics.reference import RESIDUAL_ZERO, int8_weight

    tensors = qoq_tensors(base, layer, rows)
    upper = int8_weight(tensors).float()
    weight = dequantize(source, layer, rows) / tensors["channel_scale"][:, None]
    nearest = weight.round()
    reached = nearest.maximum(upper - RESIDUAL_ZERO).minimum(upper + (15 - RESIDUAL_ZERO))
    return nearest - upper, reached.clamp(-128, 127) - upper


def _is_base(source: StoredSet) -> bool:
    config = source.config
    is_qoq = config.get("quant_method") == QOQ_LINEAR
    return is_qoq and QoQSet.parse(config, source.name).group_size != -1


def _is_source(layout: Layout) -> bool:
    is_int8 = layout.method == "dense" and layout.block == (1, layout.in_features)
    return layout.method == "plain" or is_int8


def _kind(source: StoredSet) -> str:
    method = source.config.get("quant_method", "not quantized")
    return f"{method} per channel" if method == QOQ_LINEAR and not _is_base(source) else str(method)
