"""The parts of vLLM beyond its public interface that we use, and every branch on a version.

We serve vLLM 0.26 to 0.33 (`vllm_qoq.environment`). What differs between them is probed for here;
tests/serving/test_vllm_sources.py runs unit tests against the oldest and the newest version.

* `encode_layer_name`, `resolve_layer_name`, `LayerNameType`: how a custom op
  receives the name of its layer as a graph input, so that torch.compile reuses
  one graph for all layers (vllm.utils.torch_utils).
* `has_loader_v2`: vLLM picks the loader of a linear layer by the class name of
  its quantization method (vllm.model_executor.layers.linear).
* `InductorPass`, `enable_fake_mode`: for our pass over vLLM's compiled graphs, which runs under
  the platform's `pass_key` of `inductor_compile_config` (vllm.compilation.passes).
* `fused_add_rms_norm`: how such a graph spells the norm (vllm.ir).
* `api_process_count`, `api_process_rank`: how many front ends share the engines, and which of them
  this is (vllm.config.ParallelConfig).
* `front_end_in_the_making`: the configuration of an engine while vLLM makes it. vLLM makes the
  quantization config in the middle of that, and hands it neither the options of the user nor
  anything later on in this process; but it is on the stack. Without it everything is refused a
  minute later, by the engine. So are the arguments of the command, which name its LoRA adapters.
* `drafter_in_the_making`, `handed_to`: what drafts with hidden states while its model is being
  built, and what its `propose` calls that which comes from the model. vLLM's model runners keep it
  in an attribute, and hand it to no quantization method; but they are on the stack.
* `engine_index`: which data-parallel engine this is (vllm.config.ParallelConfig). Engines of dense
  models are told that their rank is 0.
* `map_name`: what a model calls a layer that the checkpoint calls otherwise
  (vllm.model_executor.models.utils.WeightsMapper, which offers tensors and lists in public).
* `device_view`: host memory as the GPU sees it (vllm.utils.torch_utils).
* `FusedMoEMethodBase`, `RoutedExperts`, `UnquantizedFusedMoEMethod`: a mixture of experts, and the
  methods that compute one (vllm.model_executor.layers.fused_moe).
* `experts_create_arguments`: what such a method gets from the layer besides, when it creates
  weights. In 0.26 the layer decides by the class name of its own method, which is not a set's.
* `may_process_in_place`: whether a quantization method can keep vLLM from moving weights that are
  offloaded to the device (QuantizeMethodBase.requires_device_loading).
* `backends_size_pages`, `set_kv_cache_spec`, `kv_cache_layouts`: who says how large the pages of
  the KV cache are. Before 0.32 it is the attention layer (`Attention.get_kv_cache_spec`), and each
  backend orders the dimensions of its cache; from 0.32 on it is the layer's backend
  (`customize_spec`), and all backends of a model agree on one order. There, the old way is not
  refused but ignored, and the pages stay as large as without quantization.
"""

from __future__ import annotations

import inspect
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from vllm import ir
from vllm.compilation.passes.inductor_pass import InductorPass, enable_fake_mode
from vllm.config import ParallelConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import (
    FusedMoEMethodBase,
    RoutedExperts,
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import WEIGHT_LOADER_V2_SUPPORTED, LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.utils.torch_utils import (
    LayerNameType,
    get_accelerator_view_from_cpu_tensor,
)
from vllm.utils.torch_utils import _encode_layer_name as encode_layer_name
from vllm.utils.torch_utils import _resolve_layer_name as resolve_layer_name
from vllm.v1.attention.backend import AttentionBackend

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper
    from vllm.v1.kv_cache_interface import AttentionSpec
    from vllm.v1.kv_cache_layout import KVCacheLayout

__all__ = [
    "FrontEnd",
    "FusedMoEMethodBase",
    "HandedToDrafter",
    "InductorPass",
    "LayerNameType",
    "RoutedExperts",
    "UnquantizedFusedMoEMethod",
    "api_process_count",
    "api_process_rank",
    "backends_size_pages",
    "device_view",
    "drafter_in_the_making",
    "enable_fake_mode",
    "encode_layer_name",
    "engine_index",
    "experts_create_arguments",
    "front_end_in_the_making",
    "fused_add_rms_norm",
    "handed_to",
    "has_loader_v2",
    "kv_cache_layouts",
    "map_name",
    "may_process_in_place",
    "resolve_layer_name",
    "set_kv_cache_spec",
]

fused_add_rms_norm = ir.ops.fused_add_rms_norm.torch_op

_REGISTER_PORTABLE_AND_MAPPED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped


def has_loader_v2(method: LinearMethodBase) -> bool:
    """Whether the parameters of `method` expect the layer's `weight_loader_v2`."""
    return type(method).__name__ in WEIGHT_LOADER_V2_SUPPORTED


def api_process_count(parallel_config: ParallelConfig) -> int:
    """Read the number of API processes of the server, 1 where there is no server."""
    return int(parallel_config._api_process_count)


def api_process_rank(parallel_config: ParallelConfig) -> int:
    """Read which API process of the server this is; -1 for one that only starts the others."""
    return int(parallel_config._api_process_rank)


def engine_index(parallel_config: ParallelConfig) -> int:
    """Read the data-parallel index of an engine, by which its front end knows it."""
    return int(parallel_config.data_parallel_index)


@dataclass(frozen=True)
class FrontEnd:
    """The user's wishes, in the process in which vLLM makes an engine's configuration.

    is_server          whether the engine will have vLLM's asynchronous front end, not `LLM()`
    counts_statistics  whether it will count statistics, as without `--disable-log-stats`
    adapters           name -> path or id of the LoRA adapters that it will start with
    """

    vllm_config: VllmConfig
    is_server: bool
    counts_statistics: bool
    adapters: Mapping[str, str]


def front_end_in_the_making() -> FrontEnd | None:
    """Find the configuration that vLLM is making while it calls us; None if it is making none.

    All fields that the user sets are there; those that vLLM derives from them may not be yet.
    """
    vllm_config = _self_of(VllmConfig.__post_init__)
    if vllm_config is None:
        return None
    arguments = _self_of(EngineArgs.create_engine_config)
    return FrontEnd(
        vllm_config,
        is_server=isinstance(arguments, AsyncEngineArgs),
        counts_statistics=not getattr(arguments, "disable_log_stats", False),
        adapters=_adapters(vllm_config),
    )


def _adapters(vllm_config: VllmConfig) -> dict[str, str]:
    """Find the adapters that a server starts with: `--default-mm-loras` and `--lora-modules`.

    The latter are not an engine's, so they are in the arguments of the command alone.
    """
    found = dict(getattr(vllm_config.lora_config, "default_mm_loras", None) or {})
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        arguments = frame.f_locals.get("args")
        modules = getattr(arguments, "lora_modules", None)
        if isinstance(arguments, Namespace) and isinstance(modules, list):
            # A program of somebody else may have other things under this name.
            named = (one for one in modules if hasattr(one, "name") and hasattr(one, "path"))
            return found | {one.name: one.path for one in named}
        frame = frame.f_back
    return found


def _self_of(method: Callable[..., Any]) -> Any:
    """Find the object whose `method` is running in this thread, None if it is not."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is method.__code__:
            return frame.f_locals.get("self")
        frame = frame.f_back
    return None


def drafter_in_the_making() -> Any:
    """Find what drafts for the model that a model runner is loading in this thread, None if none.

    It is the runner's `drafter` (a proposer) or `speculator`, on the last pipeline stage alone.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "load_model":
            runner = frame.f_locals.get("self")
            for name in ("drafter", "speculator"):
                if (found := getattr(runner, name, None)) is not None:
                    return found
        frame = frame.f_back
    return None


@dataclass(frozen=True)
class HandedToDrafter:
    """The names of those arguments of `propose` that come from the model; None where it has none.

    hidden   the hidden states after the final norm
    streams  the stream at several layers, a list or side by side in one tensor; may be None, and
             where it is not, it is taken in the place of `hidden`
    images   a pair of a list of embeddings of images and a mask, or None
    """

    hidden: str | None
    streams: str | None
    images: str


def handed_to(drafter: Any) -> HandedToDrafter | None:
    """Find out what `drafter.propose` takes from the model; None where that is not known."""
    names = inspect.signature(drafter.propose).parameters
    if {"last_hidden_states", "aux_hidden_states"} <= names.keys():
        return HandedToDrafter("last_hidden_states", "aux_hidden_states", "mm_inputs")
    states = "target_hidden_states"
    if states not in names:
        return None
    if getattr(drafter, "eagle3_use_aux_hidden_state", False):
        return HandedToDrafter(None, states, "mm_embed_inputs")
    return HandedToDrafter(states, None, "mm_embed_inputs")


def map_name(mapper: WeightsMapper, name: str) -> str:
    """Map the name of a layer to that in vLLM; it stays where the model drops the layer."""
    mapped = mapper._map_name(name)
    return mapped if mapped is not None else name


def device_view(host: torch.Tensor) -> torch.Tensor:
    """View host memory as a CUDA tensor: what the GPU writes there, the host reads.

    `host` is pinned for the life of the process. Raises RuntimeError where the
    driver refuses.
    """
    status = torch.cuda.cudart().cudaHostRegister(
        host.data_ptr(), host.nbytes, _REGISTER_PORTABLE_AND_MAPPED
    )
    torch.cuda.check_error(int(status))
    return get_accelerator_view_from_cpu_tensor(host)


def may_process_in_place() -> bool:
    """Whether `requires_device_loading = False` of a quantization method is heeded."""
    return hasattr(QuantizeMethodBase, "requires_device_loading")


def experts_create_arguments(layer: RoutedExperts, method: FusedMoEMethodBase) -> dict[str, Any]:
    """List the arguments that `layer` adds for some methods when they create weights."""
    needs_whole_size = getattr(layer, "_needs_intermediate_size_param", None)
    if needs_whole_size is None or not needs_whole_size(method):
        return {}
    return {"intermediate_size_full": layer.moe_config.intermediate_size}


def backends_size_pages() -> bool:
    """Whether the backend of a layer says how large its pages are (vLLM 0.32+), not the layer."""
    return hasattr(AttentionBackend, "customize_spec")


def set_kv_cache_spec(layer: Attention, spec_of: Callable[[VllmConfig], AttentionSpec]) -> None:
    """Make vLLM size the cache of `layer` by `spec_of(vllm_config)`.

    From 0.32 on this does nothing, because vLLM asks the `customize_spec` of the layer's backend.
    """
    if not backends_size_pages():
        layer.get_kv_cache_spec = spec_of


def kv_cache_layouts() -> tuple[KVCacheLayout, ...]:
    """List the layouts in which the bytes of one block and head are contiguous (vLLM 0.32+).

    BLHNC has all layers of a block side by side, which vLLM needs for models that mix page sizes
    and sliding windows, and which KV connectors prefer.
    """
    from vllm.v1.kv_cache_layout import KVCacheLayout

    return KVCacheLayout.LBHNC, KVCacheLayout.BLHNC
