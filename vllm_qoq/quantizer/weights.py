"""Changing a parameter, wherever llmcompressor's pipeline keeps it."""

from __future__ import annotations

import torch

from vllm_qoq.quantizer import QuantizeError
from vllm_qoq.quantizer.model import Module


def assign(layer: Module, name: str, value: torch.Tensor) -> None:
    """Give the parameter `name` of `layer` the content of `value`, also if it is offloaded.

    Raises QuantizeError where the parameter's dtype cannot hold it.
    """
    from compressed_tensors.offload import update_offload_parameter

    dtype = getattr(layer, name).dtype
    cast = value.to(dtype)
    if not cast.isfinite().all():
        raise QuantizeError(
            f"a {name} of {list(value.shape)} leaves the range of {dtype} when norms, rotations "
            "and scales are folded into it; convert the model to bfloat16"
        )
    update_offload_parameter(layer, name, cast)
