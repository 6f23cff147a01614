"""The `FlexQuant*` model classes, for architectures with a weight loader of their own.

Most of vLLM's models load through AutoWeightsLoader, which asks the
quantization config for the renaming of tensors, so a checkpoint keeps the base
model's `architectures`. For the others, `--hf-overrides '{"architectures":
["FlexQuant<ARCHITECTURE>"]}'` selects a subclass that renames before the
model's own loader sees the tensors.

Classes are made when they are asked for (module `__getattr__`), also in the
process in which vLLM inspects models. vLLM caches what it learns of a class by
class name and by this file's hash, so the name carries vLLM's version: an
upgrade of vLLM must not find an older model's description.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import vllm
from torch import nn
from vllm.model_executor.models.registry import ModelRegistry

PREFIX = "FlexQuant"
_VERSION = "_v" + re.sub(r"\W", "_", vllm.__version__)


def register_models() -> None:
    """Register a lazy `FlexQuant*` twin of every architecture that vLLM knows."""
    known = set(ModelRegistry.get_supported_archs())
    for architecture in known:
        twin = PREFIX + architecture
        if not architecture.startswith(PREFIX) and twin not in known:
            ModelRegistry.register_model(twin, f"{__name__}:{twin}{_VERSION}")


def __getattr__(name: str) -> type[nn.Module]:
    if not (name.startswith(PREFIX) and name.endswith(_VERSION)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _twin(name.removeprefix(PREFIX).removesuffix(_VERSION))


@cache
def _twin(architecture: str) -> type[nn.Module]:
    base = ModelRegistry.models[architecture].load_model_cls()

    def load_weights(
        self: Any, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterable[str] | None:
        mapper = self.vllm_qoq_config.get_cache_scale_mapper()
        return base.load_weights(self, mapper.apply(weights))

    def __init__(self, *, vllm_config, prefix="", **kwargs):  # type: ignore[no-untyped-def]
        base.__init__(self, vllm_config=vllm_config, prefix=prefix, **kwargs)
        self.vllm_qoq_config = vllm_config.quant_config

    name = PREFIX + base.__name__
    body = {"__init__": __init__, "load_weights": load_weights, "__module__": __name__}
    return type(name, (base,), body)
