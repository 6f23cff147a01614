"""Changing a parameter, wherever llmcompressor's pipeline keeps it."""

from __future__ import annotations

import torch

from vllm_qoq.quantize.architectures import Module


def assign(layer: Module, name: str, value: torch.Tensor) -> None:
    """Give the parameter `name` of `layer` the content of `value`, also if it is offloaded."""
    from compressed_tensors.offload import update_offload_parameter

    update_offload_parameter(layer, name, value.to(getattr(layer, name).dtype))
