"""The mean of K that a checkpoint has for an attention layer: where vLLM loads it, and its shard.

vLLM renames tensors before it looks for their parameters (`get_cache_scale_mapper` of the
quantization config), and fills the parameter of the attention layer by its `weight_loader`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.distributed import parallel_state

from vllm_qoq.checkpoint.format import K_MEAN
from vllm_qoq.checkpoint.k_mean import unannounced
from vllm_qoq.errors import FormatError
from vllm_qoq.models.vision import stored_pattern
from vllm_qoq.numerics import FP16_MAX
from vllm_qoq.serving.methods.weight_set import REMEDY


def _refuse(match: re.Match[str]) -> str:
    raise FormatError(unannounced(match.string))


# What vLLM's loader renames by, where no mean is announced: it would fail on one by a KeyError. A
# model of the Hub is downloaded after everything else has been looked at.
REFUSING = {re.compile(rf"\.{K_MEAN}$"): _refuse}


def add_mean(layer: nn.Module, prefix: str) -> None:
    """Give an attention layer the parameter `k_mean`: float32 [KV heads of the rank, head size]."""
    sized: Any = layer
    # NaN until it is loaded, so that `finish_mean` sees what no file has.
    unfilled = torch.full((sized.num_kv_heads, sized.head_size), torch.nan, dtype=torch.float32)
    parameter = nn.Parameter(unfilled, requires_grad=False)
    rank = parallel_state.get_tensor_model_parallel_rank()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    name = f"{_beside(prefix)}.{K_MEAN}"

    # For loading weights anew, vLLM asks a loader for its name and its argument `param`.
    def load(param: nn.Parameter, loaded: torch.Tensor) -> None:
        mine = _mine(param, loaded, name, rank, ranks)
        if param.is_meta:  # vLLM looks at how much there is, and 0.26 leaves it at that
            sized.k_mean_anew = mine
        else:
            param.data.copy_(mine)

    parameter.weight_loader = load  # type: ignore[attr-defined]
    layer.register_parameter(K_MEAN, parameter)


def mean_of(layer: nn.Module) -> torch.Tensor | None:
    """Look up the mean of K of an attention layer, float32 [H, D]; None without one.

    Ask in every step: where weights are offloaded, a step has another tensor than the next.
    """
    mean: torch.Tensor | None = getattr(layer, K_MEAN, None)
    return mean


def finish_mean(layer: nn.Module, prefix: str) -> None:
    """Fill in what was loaded anew, and raise FormatError unless the mean, if any, was filled.

    Keys of 16 bits lose it by a subtraction, which numbers beyond them would make infinite.
    """
    mean = mean_of(layer)
    if mean is None:
        return
    if (anew := vars(layer).pop("k_mean_anew", None)) is not None:
        mean.data.copy_(anew)
    largest = float(mean.abs().max())  # NaN if there is one
    if not math.isfinite(largest):
        raise FormatError(
            f"{_beside(prefix)}.{K_MEAN}: the checkpoint announces it in kv_cache, but has no such "
            f"tensor, or NaN or infinity in it; {REMEDY}"
        )
    if largest > FP16_MAX:
        raise FormatError(
            f"{_beside(prefix)}.{K_MEAN}: holds {largest:g}, beyond the {FP16_MAX:g} of 16-bit "
            f"floats, in which keys are served; {REMEDY}"
        )


def loading_rules(
    attached: Iterable[str], without: Iterable[str]
) -> dict[re.Pattern[str], str | None]:
    """Say how tensors are renamed for vLLM's loader: `LAYER.k_mean` to `LAYER.attn.k_mean`.

    attached  the attention layers that have a mean
    without   those that have none, whose tensors are left out, because their cache has 16 bits
    """
    rules: dict[re.Pattern[str], str | None] = {}
    for name in without:
        rules[re.compile(rf"^{stored_pattern(_beside(name))}\.{K_MEAN}$")] = None
    leaves = {name.rpartition(".")[2] for name in attached}
    if not leaves:
        return {re.compile(rf"\.{K_MEAN}$"): None}
    # Layers of other pipeline ranks are not attached here, and vLLM skips their tensors. It applies
    # the rules a second time to what the model hands to its decoder.
    (leaf,) = leaves
    return rules | {re.compile(rf"(?<!\.{leaf})\.{K_MEAN}$"): f".{leaf}.{K_MEAN}"}


def shard(mean: torch.Tensor, kv_heads: int, rank: int, ranks: int) -> torch.Tensor | None:
    """Take the rows of a tensor-parallel rank, as vLLM shares out the heads of K.

    Where there are fewer heads than ranks, neighbouring ranks have the same one. None where the
    rows of `mean` [H, D] are not those of a model with `kv_heads` on each rank.
    """
    total = len(mean)
    if total == kv_heads * ranks:
        return mean[rank * kv_heads : (rank + 1) * kv_heads]
    if kv_heads == 1 and total and ranks % total == 0:
        return mean[rank // (ranks // total)][None]
    return None


def _mine(
    parameter: nn.Parameter, loaded: torch.Tensor, name: str, rank: int, ranks: int
) -> torch.Tensor:
    """Take this rank's rows of a mean; FormatError for a tensor that is not one."""
    kv_heads, head_size = parameter.shape
    mine = shard(loaded, kv_heads, rank, ranks) if loaded.ndim == 2 else None
    if mine is None or mine.shape != parameter.shape or loaded.dtype != torch.float32:
        raise FormatError(
            f"{name}: is {loaded.dtype} {list(loaded.shape)}, expected float32 [KV heads, "
            f"{head_size}] with {kv_heads} KV heads for each of {ranks} ranks; {REMEDY}"
        )
    return mine


def _beside(prefix: str) -> str:
    """Name the module that has the attention layer `prefix` and the projections."""
    return prefix.rpartition(".")[0]
