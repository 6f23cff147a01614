"""Checks that config and tensors of a set agree: vLLM expects what the config alone says.

A layer that the config leaves out and the checkpoint quantized, or the other way round, loads
nowhere; so do projections that vLLM runs as one layer and the config tells apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from vllm_qoq.checkpoint.format import SECTION
from vllm_qoq.checkpoint.methods import GPTQ, QuantizationMethod, Unit, is_nested
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.errors import FormatError
from vllm_qoq.models.names import split_decoder, split_expert

_TOWERS = ("vision", "visual", "audio", "image")
_REMEDY = "download or quantize the model again"


def findings(weights: StoredSet) -> Iterator[str]:
    """Find where config and tensors disagree, a line each. Reads no tensor."""
    if is_nested(weights.config) or not weights.config:
        return
    method = weights.method
    unserved = [f"config.json: {SECTION}.{reason}" for reason in method.unserved()]
    if unserved:
        yield from unserved
        return
    modules = {_module(layer) for layer in weights.quantized}
    linear = [layer for layer in weights.layers if _is_linear(weights, layer, modules)]
    units: dict[Unit, list[str]] = {}
    for layer in linear:
        units.setdefault(Unit.of(layer, weights.layers), []).append(layer)
    for unit, layers in sorted(units.items(), key=lambda item: item[0].name):
        try:
            yield from _disagreement(weights, method, unit, layers)
        except FormatError as error:
            yield str(error)


def hidden_order(weights: StoredSet) -> Iterator[str]:
    """Find GPTQ layers whose order of columns vLLM would not see. Reads every g_idx."""
    if not weights.config or not isinstance(weights.method, GPTQ) or weights.method.desc_act:
        return
    for layer in sorted(weights.quantized):
        tensor = f"{layer}.g_idx"
        if tensor not in weights.tensors:
            continue
        order = weights.get(tensor)
        if bool((order[1:] < order[:-1]).any()):
            yield (
                f"{weights.tensors[tensor].file}: {tensor}: orders the columns anew, but "
                f"{SECTION}.desc_act is false, so vLLM does not read it; quantize with "
                "desc_act=False"
            )


def _disagreement(
    weights: StoredSet, method: QuantizationMethod, unit: Unit, layers: Collection[str]
) -> Iterator[str]:
    """Find what is wrong with a unit that runs the `layers`, its parts or all experts."""
    every = {*unit.parts, *layers}
    stored = every & weights.quantized
    if stored and len(stored) < len(every):
        lost = min(every - stored)
        yield (
            f"{lost}: is not quantized, but {min(stored)} is, and vLLM runs both as one layer; "
            "quantize both or neither"
        )
        return
    for each in (unit, *_other_experts(unit, layers)):
        finding = _unlike_config(weights, method, each, is_stored=bool(stored))
        if finding is not None:
            yield finding
            return


def _unlike_config(
    weights: StoredSet, method: QuantizationMethod, unit: Unit, is_stored: bool
) -> str | None:
    """Find whether the config says otherwise of a unit than the tensors do."""
    # Names in patterns are vLLM's, which differ from the checkpoint's in models with several parts.
    for name in (unit, *_other_names(weights, unit)):
        if method.quantizes(name, frozenset(name.parts if is_stored else ())) == is_stored:
            return None
    if is_stored:
        return (
            f"{unit.parts[0]}: is quantized, but {SECTION} leaves it out, so vLLM would not "
            f"load it; mend the config or quantize the model again"
        )
    return f"{unit.parts[0]}: is not quantized, but {SECTION} does not leave it out; {_REMEDY}"


def _other_experts(unit: Unit, layers: Collection[str]) -> Iterator[Unit]:
    """List the experts of a mixture after the first, each as a unit of the mixture's name."""
    experts: dict[int, list[str]] = {}
    for layer in sorted(layers):
        place = split_expert(layer)
        if place is not None and layer not in unit.parts:
            experts.setdefault(place[1], []).append(layer)
    for _, parts in sorted(experts.items()):
        yield Unit(unit.name, tuple(parts))


def _is_linear(weights: StoredSet, layer: str, modules: Collection[str | None]) -> bool:
    """Whether a layer is linear: quantized here or in another block, or named like a projection."""
    if "lm_head" in layer or "embed" in layer:
        return False
    if layer in weights.quantized:
        return True
    # Many models run their towers unquantized, whatever the config says of them.
    if any(tower in layer for tower in _TOWERS):
        return False
    weight, module = weights.layers[layer].get("weight"), _module(layer)
    is_matrix = weight is not None and len(weight.shape) == 2
    is_named_so = "_proj" in layer.rpartition(".")[2]  # also in_proj_qkvz
    return is_matrix and module is not None and (module in modules or is_named_so)


def _module(layer: str) -> str | None:
    """The module of a layer in the decoder, such as `self_attn.o_proj`; None elsewhere."""
    place = split_decoder(layer)
    return place[2] if place is not None else None


def _other_names(weights: StoredSet, unit: Unit) -> Iterator[Unit]:
    if not isinstance(weights.checkpoint.config.get("text_config"), dict):
        return
    for old, new in (
        ("model.language_model.", "language_model.model."),
        ("language_model.model.", "model.language_model."),
        ("model.", ""),
    ):
        if unit.name.startswith(old):
            renamed = (new + name.removeprefix(old) for name in (unit.name, *unit.parts))
            name, *parts = renamed
            yield Unit(name, tuple(parts))
