"""Changing a parameter, wherever llmcompressor's pipeline keeps it."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Rows:
    """The rows `start` to `stop` of a linear layer: all of them, or those of K in a qkv_proj."""

    layer: Module
    start: int
    stop: int

    @property
    def weight(self) -> torch.Tensor:
        """The weight of these rows, float [stop - start, K]."""
        weight: torch.Tensor = self.layer.weight.data[self.start : self.stop]
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of these rows, float [stop - start]; None for a layer without one."""
        bias = self.layer.bias
        return None if bias is None else bias.data[self.start : self.stop]

    def assign(self, name: str, value: torch.Tensor) -> None:
        """Give the `name` of these rows, "weight" or "bias", the content of `value`."""
        before = getattr(self.layer, name).data
        if len(value) != len(before):
            whole = before.to(value.dtype, copy=True)
            whole[self.start : self.stop] = value
            value = whole
        assign(self.layer, name, value)
