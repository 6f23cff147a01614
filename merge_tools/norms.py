"""Norms that differ between sets: one is stored, and the other sets carry the quotient.

SmoothQuant divides the weight of a norm by a factor per channel and multiplies
the columns of the layers that read it. A checkpoint keeps the norm of the prefill
set, so a layer of another set multiplies its input by

    input_ratio = norm of its set / norm of the prefill set     float32 [in_features]
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from merge_tools import MergeError
from vllm_qoq.checkpoint.format import INPUT_RATIO, split_layer
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.models.names import layer_globs
from vllm_qoq.models.table import norm_offset, norm_readers

if TYPE_CHECKING:
    import torch

_RECIPE = "quantize both from one transformed model, or without SmoothQuant"


def readers_of(
    config: Mapping[str, Any], tensor: str, quantized: frozenset[str], sets: str
) -> tuple[str, ...]:
    """The layers that make up for `tensor`, an unquantized one that differs between sets.

    `quantized` are the layers with a weight per set. Raises MergeError, which names the `sets`,
    where nothing can make up for `tensor`.
    """
    layer, leaf = split_layer(tensor)
    readers = norm_readers(config, layer) if leaf == "weight" else ()
    if not readers:
        raise MergeError(f"{tensor}: differs between {sets}: {_reason(tensor)}; {_RECIPE}")
    shared = [reader for reader in readers if reader not in quantized]
    if shared:
        raise MergeError(
            f"{tensor}: differs between {sets}, but {shared[0]}, which reads it, is quantized in "
            f"no set and therefore stored once; {_RECIPE}"
        )
    return readers


def ratio(numerator: StoredSet, denominator: StoredSet, norm: str) -> torch.Tensor:
    """Divide the tensor `norm` of one set by that of the prefill set: float32 [in_features].

    What is divided is what a norm multiplies by, which in Gemma is 1 + its tensor.
    0/0 is 1: such a channel is dead in both sets. Raises MergeError where no factor helps.
    """
    import torch

    offset = norm_offset(denominator.checkpoint.config)
    above, below = (one.get(norm).float() + offset for one in (numerator, denominator))
    quotient = torch.where((above == 0) & (below == 0), torch.ones_like(above), above / below)
    if not quotient.isfinite().all():
        channel = int((~quotient.isfinite()).nonzero()[0])
        raise MergeError(
            f"{norm}: channel {channel} is {below[channel]:g} in {denominator.name} and "
            f"{above[channel]:g} in {numerator.name}, which no factor brings together; {_RECIPE}"
        )
    return quotient


def ratio_globs(
    ratios: Mapping[str, tuple[str, ...]], quantized: frozenset[str]
) -> dict[str, tuple[str, ...]]:
    """The `Section.input_ratio` for the layers that have a ratio: set -> globs.

    Raises RuntimeError if the globs would match another layer, which is a bug of this module.
    """
    globs = {name: layer_globs(layers, quantized) for name, layers in ratios.items() if layers}
    for name, mine in globs.items():
        # `*` matches dots too, so what the globs match is looked at, not how they were made.
        matched = {x for x in quantized if any(fnmatchcase(x, glob) for glob in mine)}
        if matched != set(ratios[name]):
            raise RuntimeError(f"{INPUT_RATIO}.{name}: {mine} matches {sorted(matched)}")
    return globs


def _reason(tensor: str) -> str:
    layer, _ = split_layer(tensor)
    if "embed" in layer or "lm_head" in layer or "wte" in layer:
        return "they come from different models, or one was rotated (QuaRot, SpinQuant)"
    if layer.endswith("gate"):
        return "it chooses experts, and all sets choose the same ones"
    if layer.endswith("norm"):
        return "the merge does not know which layers read this norm"
    return "it belongs to no quantized layer, so all sets use the same one"
