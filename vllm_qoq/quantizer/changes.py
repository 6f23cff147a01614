"""The file that says how the weights of a model were transformed (`checkpoint.transforms`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_qoq.checkpoint import transforms
from vllm_qoq.checkpoint.format import K_MEAN
from vllm_qoq.models.table import LayerNames
from vllm_qoq.numerics import rotation as basis
from vllm_qoq.quantizer.model import Module, blocks


def folded_norms(model: Module, names: LayerNames) -> dict[str, torch.Tensor]:
    """Take what the norms of all blocks multiply by, before `rotate_stream` folds them."""
    return {
        f"{names.blocks}.{index}.{norm}.{transforms.FOLDED}": (
            block.get_submodule(norm).weight.detach().double() + names.norm_offset
        )
        .float()
        .cpu()
        for index, block in enumerate(blocks(model, names))
        for norm in names.of_block(index).norms
    }


def stored(
    names: LayerNames,
    folded: Mapping[str, torch.Tensor],
    smoothed: Mapping[str, torch.Tensor],
    values: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """List the tensors of the file, without that of the weights; none where they stayed.

    folded    the `folded_norms`, where the stream is rotated
    smoothed  the transforms that smoothing found, named INDEX.NAME
    values    R2, where values are rotated
    """
    tensors = dict(folded)
    for key, tensor in smoothed.items():
        if key.rpartition(".")[2] != K_MEAN:  # of the cache, not of the weights
            dtype = torch.float32 if tensor.is_floating_point() else torch.int32
            tensors[f"{names.blocks}.{key}"] = tensor.to(dtype).contiguous()
    if values is not None:
        tensors[transforms.VALUE_ROTATION] = basis.signs(values).cpu()
    return tensors
