"""The order of sets by accuracy, as far as their quantization configs tell.

More bits a weight come before fewer; among equals, more bits an activation; then the order in the
checkpoint decides. Which 4-bit method loses less has to be measured (`vllm-qoq perplexity`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm_qoq.checkpoint.format import QOQ_LINEAR, QOQ_RESIDUAL
from vllm_qoq.errors import printable
from vllm_qoq.tuner import TuneError

_UNQUANTIZED = 16


class SetBits(NamedTuple):
    """The bits of a weight and of an activation; 16 stands for the model's own dtype."""

    weights: int
    activations: int


def accuracy_order(sets: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Order the names of the sets, the most accurate first; TuneError where bits are not known."""
    found = {name: bits(name, config) for name, config in sets.items()}
    return tuple(sorted(found, key=found.__getitem__, reverse=True))


def bits(name: str, config: Mapping[str, Any]) -> SetBits:
    """The bits of the set `name`, the fewest where its layers differ."""
    method = config["quant_method"]
    try:
        if method == QOQ_LINEAR:
            return SetBits(4, 8)
        if method in ("fp8", QOQ_RESIDUAL):
            return SetBits(8, 8)
        if method.startswith("gptq"):
            return SetBits(_positive(config["bits"]), _UNQUANTIZED)
        if method.startswith("awq"):
            bits_of_awq = config["bits"] if "bits" in config else config["w_bit"]
            return SetBits(_positive(bits_of_awq), _UNQUANTIZED)
        if method == "compressed-tensors":
            return _compressed_tensors(config["config_groups"])
    except (KeyError, TypeError, ValueError, AttributeError):
        pass  # All of these have the same remedy.
    raise TuneError(
        f"set {name!r} ({printable(str(method))}): its config does not say how many bits it has, "
        "so it has no place in the order of accuracy; write the routing into config.json by hand"
    )


def _compressed_tensors(groups: Mapping[str, Any]) -> SetBits:
    found = [
        SetBits(_of(group["weights"]), _of(group.get("input_activations")))
        for group in groups.values()
    ]
    return SetBits(min(b.weights for b in found), min(b.activations for b in found))


def _of(scheme: Mapping[str, Any] | None) -> int:
    return _UNQUANTIZED if scheme is None else _positive(scheme["num_bits"])


def _positive(value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError
    return value
