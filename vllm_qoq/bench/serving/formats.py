"""The formats that `bench serving` compares: how weights, inputs and the KV cache are stored.

A format is named WEIGHTS, WEIGHTS-kvCACHE or WEIGHTS-k8v4: `fp8-kvfp8` is fp8 with an fp8 cache,
`w4a8-head8-kv4` is ours with an int8 lm_head and the 4-bit cache, and `w4a8-k8v4` has keys of 8
bits and values of 4. Without any of these the cache is in the model's dtype.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_qoq.bench import BenchError
from vllm_qoq.models.table import ARCHITECTURES

GROUP = 128  # inputs that share a scale, in formats with groups
CACHES = {"16": 16, "fp8": 8, "8": 8, "k8v4": 6, "4": 4}
"""Cache -> bits of a number in it, on average of K and V."""
OUR_CACHES: dict[str, int | str] = {"8": 8, "k8v4": "k8v4", "4": 4}
"""Cache of ours, with scales and zeros beside -> `kv_bits`."""
SUFFIXES = {f"-{'' if cache == 'k8v4' else 'kv'}{cache}": cache for cache in CACHES}
"""The end of a format's name -> its cache."""
ROUTERS = sorted({one.experts.router for one in ARCHITECTURES.values() if one.experts})
"""What mixtures of experts call their router, which stays in float in every format."""
SCALES_BYTES = 4
"""The bytes of the scale and zero of a token's key, or value, in one head of our caches."""


@dataclass(frozen=True)
class Weights:
    """The form of the linear layers.

    step_bits  bits of a weight, with its scales, that a decode step reads
    inputs     what the tensor cores multiply: bf16, fp8 or int8
    head_bits  bits of a weight of the lm_head
    """

    step_bits: float
    inputs: str
    head_bits: int = 16
    is_ours: bool = False


WEIGHTS = {
    "bf16": Weights(16, "bf16"),
    "fp8": Weights(8, "fp8"),
    "w8a8": Weights(8, "int8"),
    "w4a16": Weights(4.125, "bf16"),
    "w4a8": Weights(4.125, "int8", is_ours=True),
    "w4a8-head8": Weights(4.125, "int8", 8, is_ours=True),
    "nested": Weights(4.125, "int8", is_ours=True),
    "nested-head8": Weights(4.125, "int8", 8, is_ours=True),
}
DEFAULT = ("fp8-kvfp8", "w8a8-kvfp8", "w4a16-kvfp8", "w4a8-head8-kv4", "nested-head8-kv4")


@dataclass(frozen=True)
class Format:
    """Weights and a cache, by their names in WEIGHTS and CACHES."""

    weights_name: str
    cache: str

    @property
    def weights(self) -> Weights:
        """The form of the linear layers."""
        return WEIGHTS[self.weights_name]

    @property
    def has_our_cache(self) -> bool:
        """Whether the cache is ours, which has fewer than 16 bits."""
        return self.cache in OUR_CACHES

    @property
    def is_ours(self) -> bool:
        """Whether any part of the format is ours, rather than vLLM's."""
        return self.weights.is_ours or self.has_our_cache

    def engine_args(self) -> dict[str, Any]:
        """Make the arguments of `LLM()` that the `config.json` does not imply."""
        from vllm_qoq.checkpoint.format import QUANT_METHOD  # not for --help: it takes 0.2 s

        if self.cache == "fp8":
            return {"kv_cache_dtype": "fp8"}
        if self.has_our_cache and not self.weights.is_ours:
            return {
                "quantization": QUANT_METHOD,
                "additional_config": {QUANT_METHOD: {"kv_bits": OUR_CACHES[self.cache]}},
            }
        return {}

    def config(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """Make the `config.json` of the format from that of the unquantized model."""
        config = copy.deepcopy(dict(model))
        if section := self._section():
            config["quantization_config"] = section
        return config

    def _section(self) -> dict[str, Any] | None:
        from vllm_qoq.checkpoint.format import QUANT_METHOD

        if self.weights_name == "bf16":
            return None
        if not self.weights.is_ours:
            return _compressed_tensors(self.weights_name)
        is_nested = self.weights_name.startswith("nested")
        sets: dict[str, Any] = {"w4a8": {"quant_method": "qoq_linear", "group_size": GROUP}}
        if is_nested:
            sets = {"w8a8": {"quant_method": "qoq_residual", "base": "w4a8"}, **sets}
        section: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "format_version": 1,
            "sets": sets,
            "routing": {
                "prefill": "w8a8" if is_nested else "w4a8",
                "decode": [{"set": "w4a8"}],
            },
        }
        if self.weights.head_bits != 16:
            section["lm_head"] = {"bits": self.weights.head_bits}
        if self.has_our_cache:
            section["kv_cache"] = {"bits": OUR_CACHES[self.cache]}
        return section


class Measurable(Protocol):
    """Something with a name that is measured: a format, or a checkpoint, whose format is None."""

    @property
    def name(self) -> str:
        """What tables and pictures call it."""

    @property
    def is_ours(self) -> bool:
        """Whether any part of it is ours, rather than vLLM's."""

    @property
    def format(self) -> Format | None:
        """How weights and cache are stored; None for a checkpoint."""


def parse(name: str) -> Format:
    """Parse the name of a format; BenchError for one that does not exist."""
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    found = Format(name.removesuffix(suffix), SUFFIXES.get(suffix, "16"))
    if found.weights_name not in WEIGHTS:
        raise BenchError(
            f"{name!r} is not a format; a format is WEIGHTS or WEIGHTS with a cache behind, with "
            f"WEIGHTS one of {', '.join(WEIGHTS)} and caches {', '.join(SUFFIXES)}"
        )
    if found.weights.is_ours and found.cache == "fp8":
        raise BenchError(
            f"{name!r}: with {found.weights_name} the cache is of 16, 8 or 4 bits, or k8v4"
        )
    return found


def _compressed_tensors(name: str) -> dict[str, Any]:
    """Make the section that llmcompressor writes for fp8, W8A8 and W4A16."""
    has_inputs = name != "w4a16"
    kind = {"type": "float" if name == "fp8" else "int", "symmetric": True}
    weights = {"num_bits": 8, "strategy": "channel"}
    if not has_inputs:
        weights = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
    inputs = {"num_bits": 8, **kind, "strategy": "token", "dynamic": True}
    layout = {"fp8": "float-quantized", "w8a8": "int-quantized", "w4a16": "pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": layout[name],
        "quantization_status": "compressed",
        "ignore": ["lm_head", *(f"re:.*{re.escape(router)}$" for router in ROUTERS)],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**weights, **kind, "dynamic": False},
                "input_activations": inputs if has_inputs else None,
            }
        },
    }
