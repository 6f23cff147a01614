"""The tensors of experts in floating point that all sets share, as parts of vLLM's parameters.

vLLM keeps all experts of a layer in two parameters, w13 (gate and up) and w2 (down), which may be
larger than the model's sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn

from vllm_qoq.serving.methods.expert_set import shards_of_w13, stored_name
from vllm_qoq.serving.vllm_versions import RoutedExperts, UnquantizedFusedMoEMethod


@dataclass(frozen=True)
class Projection:
    """One tensor of each expert that this rank has: names in the checkpoint, and data [E, ...]."""

    names: tuple[str, ...]
    data: torch.Tensor

    def are_sound(self) -> torch.Tensor:
        """Say of each expert whether all its numbers are finite, bool [E]."""
        dims = tuple(range(1, self.data.ndim))
        # These pass NaN on.
        ends = torch.stack([self.data.amin(dims), self.data.amax(dims)])
        return ends.isfinite().all(0)


def has_float_experts(module: nn.Module) -> TypeGuard[RoutedExperts]:
    """Whether `module` holds experts that no set quantizes, once for all sets."""
    return isinstance(module, RoutedExperts) and isinstance(
        module.quant_method, UnquantizedFusedMoEMethod
    )


def loaded_name(layer: RoutedExperts, leaf: str, **arguments: Any) -> str:
    """Name the tensor with which vLLM calls the loader of the parameter `leaf`.

    arguments  of the loader, by name; without an expert it is a tensor of all experts
    """
    if not {"shard_id", "expert_id"} <= arguments.keys():
        return f"{layer.layer_name}.{leaf}"
    shard_id, expert_id = arguments["shard_id"], arguments["expert_id"]
    return stored_name(layer, layer.layer_name, leaf, shard_id, expert_id)


def weights_of(layer: RoutedExperts) -> Iterator[tuple[str, nn.Parameter]]:
    """List vLLM's parameters of experts; others on the layer, of its router, are not its own."""
    for leaf, parameter in layer.named_parameters(recurse=False):
        if leaf.startswith(("w13_", "w2_")) and not parameter.is_meta:
            yield leaf, parameter


def projections(layer: RoutedExperts) -> Iterator[Projection]:
    """List what a checkpoint has to fill of the experts in `layer`, apart from padding."""
    inner = layer.moe_config.intermediate_size_per_partition_unpadded
    hidden = layer.moe_config.hidden_dim_unpadded
    numbers = {
        layer._map_global_expert_id_to_local_expert_id(expert): expert
        for expert in range(layer.global_num_experts)
    }
    for leaf, parameter in weights_of(layer):
        is_w13 = leaf.startswith("w13")
        shards = shards_of_w13(layer) if is_w13 else ("w2",)
        rows, columns = (inner, hidden) if is_w13 else (hidden, inner)
        padded = parameter.shape[1] // len(shards)
        for index, shard in enumerate(shards):
            data = parameter.data[:, index * padded : index * padded + rows]
            data = data[..., :columns] if data.ndim > 2 else data  # a bias has no columns
            names = (
                stored_name(layer, layer.layer_name, leaf, shard, numbers.get(place, place))
                for place in range(len(data))
            )
            yield Projection(tuple(names), data)
