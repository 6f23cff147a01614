"""The proof that a checkpoint filled what all sets share: norms, embeddings, lm_head, experts.

vLLM does not look at them in quantized models: a norm that no file has stays ones, an embedding
stays what was in memory, and NaN is served. So before loading all of them are made NaN, and after
it none may be left. That needs no list of names, and sees whatever way a model loads.

Loaders that fill parameters without the model's `load_weights` (dummy, sharded_state, tensorizer)
never call the function that renames tensors, with which the check begins, so they are not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from vllm_qoq.errors import FormatError
from vllm_qoq.serving.methods.after_loading import AfterLoading
from vllm_qoq.serving.methods.expert_set import ExpertSet
from vllm_qoq.serving.methods.weight_set import DEVICE_ERRORS, REMEDY, Loader, WeightSet
from vllm_qoq.serving.plugin.float_experts import (
    has_float_experts,
    loaded_name,
    projections,
    weights_of,
)
from vllm_qoq.serving.vllm_versions import RoutedExperts, may_process_in_place

_LOADER = "weight_loader"

NameOf = Callable[..., str]


def begin_load(model: nn.Module) -> None:
    """Begin the check of a model that was just built, before its first tensor is loaded."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 and not may_process_in_place():
        return  # an old vLLM would move all that is offloaded to the device at once
    model.quant_method = LoadCheck(model)


class LoadCheck(AfterLoading):
    """The `quant_method` of a model from the beginning of its load until vLLM processes it.

    vLLM does that when everything is loaded, and comes to the model before its layers.
    """

    # Where weights are offloaded, vLLM would move the whole model to the device.
    requires_device_loading = False

    def __init__(self, model: nn.Module) -> None:
        self._own_loaders: list[tuple[nn.Parameter, Loader | None]] = []
        for name, parameter in _shared(model):
            parameter.data.fill_(float("nan"))
            self._name_refusals(partial(_only_name, name), parameter)
        for experts in _float_experts(model):
            for part in projections(experts):
                part.data.fill_(float("nan"))
            for leaf, parameter in weights_of(experts):
                self._name_refusals(partial(loaded_name, experts, leaf), parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Raise FormatError unless every shared parameter was filled with finite numbers."""
        del layer.quant_method
        for parameter, own in self._own_loaders:
            if own is None:
                delattr(parameter, _LOADER)
            else:
                setattr(parameter, _LOADER, own)
        self._own_loaders.clear()
        parts = [part for experts in _float_experts(layer) for part in projections(experts)]
        tensors = [(name, parameter.data) for name, parameter in _shared(layer)]
        # aminmax passes NaN on, and so only one number of each tensor has to leave the device.
        ends = [torch.stack(torch.aminmax(data)) for _, data in tensors]
        are_sound = [pair.float().isfinite().all()[None] for pair in ends]
        are_sound += [part.are_sound() for part in parts]
        tensors += [item for part in parts for item in zip(part.names, part.data, strict=True)]
        here = [flag.to(are_sound[0].device) for flag in are_sound]
        flags = torch.cat(here).tolist() if here else []
        faults = [item for item, is_sound in zip(tensors, flags, strict=True) if not is_sound]
        if not faults:
            return
        name, tensor = faults[0]
        more = f" (and {len(faults) - 1} more tensors)" if len(faults) > 1 else ""
        if tensor.isnan().all():
            raise FormatError(
                f"the checkpoint did not fill {name}{more}: it has no such tensor, or nothing but "
                f"NaN in it; {REMEDY}"
            )
        raise FormatError(f"{name}{more} holds NaN or infinity, or was filled in part; {REMEDY}")

    def _name_refusals(self, name: NameOf, parameter: nn.Parameter) -> None:
        own = getattr(parameter, _LOADER, None)
        self._own_loaders.append((parameter, own))
        # A plain parameter has the attribute only where somebody sets it.
        setattr(parameter, _LOADER, _naming(name, own or default_weight_loader))


def _only_name(name: str, **arguments: Any) -> str:
    """Name the only tensor that a parameter is loaded from."""
    return name


def _naming(name_of: NameOf, load: Loader) -> Loader:
    """Put the tensor's name before the refusals of `load`, which are bare assertions.

    name_of  finds the name by the loader's arguments
    """

    def load_named(
        param: nn.Parameter, loaded_weight: torch.Tensor, *rest: Any, **more: Any
    ) -> Any:
        try:
            if not loaded_weight.is_floating_point():
                raise AssertionError(f"numbers of the type {loaded_weight.dtype}")
            return load(param, loaded_weight, *rest, **more)
        except DEVICE_ERRORS:
            raise
        except (AssertionError, RuntimeError, IndexError) as error:
            raise FormatError(
                f"{name_of(**more)} has shape {list(loaded_weight.shape)} in the checkpoint and "
                f"{list(param.shape)} in this rank's model, into which it does not go "
                f"({error}); {REMEDY}"
            ) from error

    return load_named


def _float_experts(model: nn.Module) -> Iterator[RoutedExperts]:
    """List the layers with experts that all sets share."""
    return (module for module in model.modules() if has_float_experts(module))


def _shared(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """List the parameters that a checkpoint has to fill and no set, cache or expert owns."""
    seen: set[int] = set()  # tied weights are one parameter under two names
    for prefix, module in model.named_modules():
        if isinstance(module, WeightSet | ExpertSet | Attention | MLAAttention):
            continue  # sets prove it themselves, and a cache may have no scales
        if isinstance(getattr(module, "quant_method", None), FusedMoEMethodBase):
            continue  # sets prove these, too, and `_float_experts` has the others
        if any(isinstance(child, WeightSet) for child in module.children()):
            continue  # a bias that each set has for itself
        for name, parameter in module.named_parameters(recurse=False):
            is_float = parameter.is_floating_point() and parameter.element_size() > 1
            is_stored = is_float and parameter.numel() > 0 and not parameter.is_meta
            if is_stored and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}.{name}" if prefix else name, parameter
