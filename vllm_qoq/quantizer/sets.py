"""The kinds of sets that `quantize` can make: their grids and their entries in config.json."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_qoq.checkpoint.format import QoQSet, ResidualSet
from vllm_qoq.numerics import reference
from vllm_qoq.quantizer.grid import Grid, PerChannel, Symmetric, TwoLevel
from vllm_qoq.quantizer.nested import Nested


@dataclass(frozen=True)
class SetKind:
    """A kind of set: `w8a8`, `w4a8` or `w4a16`.

    group_size  128, 64, 32 or -1 (w4a8: no groups; w4a16: a scale per output channel)
    base        the set that a nested w8a8 is stored as a residual on; None for any other
    """

    name: str
    group_size: int
    base: str | None = None

    @property
    def has_int8_activations(self) -> bool:
        """Whether vLLM quantizes the inputs of the set's layers per token."""
        return self.name.endswith("a8")

    @property
    def bits(self) -> float:
        """Stored bits per weight, with the scales of groups but not those of rows."""
        if self.base is not None:
            return 4.0
        if self.name == "w8a8":
            return 8.0
        return 4.0 if self.group_size == -1 else 4.0 + 16 / self.group_size

    def grid(
        self, weight: torch.Tensor, dtype: torch.dtype, clip: bool, base: Grid | None = None
    ) -> Grid:
        """Make an empty grid for `weight` [N, K]; `dtype` is the model's.

        base  the layer's filled grid in the set `self.base`
        """
        if self.base is not None:
            assert isinstance(base, TwoLevel)
            return Nested(base)
        n, k = weight.shape
        if self.name == "w4a8":
            if self.group_size == -1:
                return PerChannel(n, k, weight.device, clip=clip)
            return TwoLevel(n, k, weight.device, clip=clip, width=self.group_size)
        bits = 8 if self.name == "w8a8" else 4
        group = self.group_size if bits == 4 and self.group_size != -1 else None
        return Symmetric(n, k, weight.device, clip=clip, bits=bits, group=group, scale_dtype=dtype)

    def config(self, floats: tuple[str, ...] = (), towers: tuple[str, ...] = ()) -> dict[str, Any]:
        """Make the set's entry in `quantization_config.sets`.

        floats  names, below a block, of layers that no set quantizes: routers, and the
                narrow ones of linear attention
        towers  modules beside the language model, of which no set quantizes any layer
        """
        if self.base is not None:
            return ResidualSet(base=self.base).model_dump(mode="json")
        if self.name == "w4a8":
            beside = (glob for tower in towers for glob in (f"{tower}.*", f"*.{tower}.*"))
            ignore = ("lm_head", *(f"*.{name}" for name in floats), *beside)
            return QoQSet(group_size=self.group_size, ignore=ignore).model_dump(mode="json")
        is_w8 = self.name == "w8a8"
        integer = {"type": "int", "symmetric": True}
        has_groups = not is_w8 and self.group_size != -1
        weights = {
            "num_bits": 8 if is_w8 else 4,
            **integer,
            "strategy": "group" if has_groups else "channel",
            "group_size": self.group_size if has_groups else None,
            "dynamic": False,
        }
        activations = {"num_bits": 8, **integer, "strategy": "token", "dynamic": True}
        return {
            "quant_method": "compressed-tensors",
            "format": "int-quantized" if is_w8 else "pack-quantized",
            "quantization_status": "compressed",
            "ignore": [
                "lm_head",
                *(f"re:.*{re.escape(f'.{name}')}$" for name in floats),
                *(rf"re:(.*\.)?{tower}\." for tower in towers),
            ],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": activations if is_w8 else None,
                }
            },
        }


def dequantize(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Dequantize a layer of any kind of set from its tensors, by leaf: float32 [N, K].

    The tensors of a nested set are the base's and its own.
    """
    if "qweight" in tensors:
        return reference.dequantize(dict(tensors))
    scale = tensors["weight_scale"].float()
    if "weight_packed" in tensors:
        words = tensors["weight_packed"]
        codes = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], dim=-1).flatten(1) - 8
    else:
        codes = tensors["weight"]
    return codes.float() * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)


def dequantized(
    tensors: Mapping[str, torch.Tensor], kind: SetKind, layers: Iterable[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Dequantize the `layers` of a block in one set: (layer, float32 [N, K]), one after the other.

    tensors  those of the block, named SET.LAYER.LEAF
    """
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, leaf = key.rpartition(".")
        by_layer.setdefault(owner, {})[leaf] = tensor
    for layer in layers:
        base = by_layer[f"{kind.base}.{layer}"] if kind.base is not None else {}
        yield layer, dequantize({**base, **by_layer[f"{kind.name}.{layer}"]})
