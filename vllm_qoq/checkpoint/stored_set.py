"""One quantized version of a model, as a checkpoint stores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vllm_qoq.checkpoint.folder import Checkpoint, TensorInfo
from vllm_qoq.checkpoint.layout import Layout, describe, group_leaves, is_quantized
from vllm_qoq.checkpoint.methods import QuantizationMethod, Unit, is_nested, parse

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StoredSet:
    """One quantized version of a model: a whole checkpoint, or one set of several in it.

    `tensors` has the names of an ordinary checkpoint; the `name` of each info is the
    one in the file, with the prefix that a merged checkpoint puts in front.
    """

    name: str
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    """The `quantization_config` of this set."""
    tensors: Mapping[str, TensorInfo]
    shared_layers: frozenset[str] = field(default=frozenset(), kw_only=True)
    """Layers that are quantized alike for all sets, and so in none."""
    base: StoredSet | None = field(default=None, kw_only=True)
    """The set that this one is a residual on; None unless it is nested in a merged checkpoint."""

    @cached_property
    def layers(self) -> dict[str, dict[str, TensorInfo]]:
        """The tensors by layer and leaf."""
        return group_leaves(self.tensors)

    @cached_property
    def quantized(self) -> frozenset[str]:
        """The layers that are quantized in this set."""
        found = (name for name, leaves in self.layers.items() if is_quantized(leaves))
        return frozenset(found) - self.shared_layers

    @cached_property
    def method(self) -> QuantizationMethod:
        """The method of `config`, which must not be empty; FormatError as in `methods.parse`."""
        return parse(self.config)

    def describe(self, layer: str) -> Layout:
        """Find how `layer` is stored; FormatError when its tensors do not fit together."""
        config = self.config
        if config and not is_nested(config):
            config = self.method.of_layer(Unit.of(layer, self.layers), config)
        return describe(self.layers[layer], config)

    def size(self, layer: str) -> tuple[int, int]:
        """The size of `layer` as (out_features, in_features); FormatError as in `describe`."""
        layout = self.describe(layer)
        return layout.out_features, layout.in_features

    def get(self, tensor: str) -> torch.Tensor:
        """Read the tensor with this ordinary name, mapped and not copied."""
        return self.checkpoint.get(self.tensors[tensor].name)
