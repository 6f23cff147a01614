"""What vllm-qoq takes from vLLM beyond its public interface, and every branch on a version.

Served: vLLM 0.26 to 0.33. What differs between them is probed for here, and nowhere else;
tests/test_vllm_sources.py imports this package against the oldest and the newest version.

* `encode_layer_name`, `resolve_layer_name`, `LayerNameType`: how a custom op
  receives the name of its layer as a graph input, so that torch.compile reuses
  one graph for all layers (vllm.utils.torch_utils).
* `has_loader_v2`: vLLM picks the loader of a linear layer by the class name of
  its quantization method (vllm.model_executor.layers.linear).
* `InductorPass`, `enable_fake_mode`: a pass of ours over vLLM's compiled graphs, which runs under
  the platform's `pass_key` of `inductor_compile_config` (vllm.compilation.passes).
* `fused_add_rms_norm`: how such a graph spells the norm (vllm.ir).
* `api_process_count`: how many front ends share the engines (vllm.config.ParallelConfig).
* `device_view`: host memory as the GPU sees it (vllm.utils.torch_utils).
* `may_process_in_place`: whether a quantization method can keep vLLM from moving weights that are
  offloaded to the device (QuantizeMethodBase.requires_device_loading).
* `backends_size_pages`, `set_kv_cache_spec`, `kv_cache_layouts`: who says how large the pages of
  the KV cache are. Before 0.32 it is the attention layer (`Attention.get_kv_cache_spec`), and each
  backend orders the dimensions of its cache; from 0.32 on it is the layer's backend
  (`customize_spec`), and all backends of a model agree on one order. There, the old way is not
  refused but ignored, and the pages stay as large as without quantization.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm import ir
from vllm.compilation.passes.inductor_pass import InductorPass, enable_fake_mode
from vllm.config import ParallelConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import WEIGHT_LOADER_V2_SUPPORTED, LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.utils.torch_utils import (
    LayerNameType,
    get_accelerator_view_from_cpu_tensor,
)
from vllm.utils.torch_utils import _encode_layer_name as encode_layer_name
from vllm.utils.torch_utils import _resolve_layer_name as resolve_layer_name
from vllm.v1.attention.backend import AttentionBackend

__all__ = [
    "InductorPass",
    "LayerNameType",
    "api_process_count",
    "backends_size_pages",
    "device_view",
    "enable_fake_mode",
    "encode_layer_name",
    "fused_add_rms_norm",
    "has_loader_v2",
    "kv_cache_layouts",
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
    """The number of API processes of the server, 1 where there is no server."""
    return int(parallel_config._api_process_count)


def device_view(host: torch.Tensor) -> torch.Tensor:
    """The same memory as a CUDA tensor: what the GPU writes there, the host reads.

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


def backends_size_pages() -> bool:
    """Whether the backend of a layer says how large its pages are (vLLM 0.32+), not the layer."""
    return hasattr(AttentionBackend, "customize_spec")


def set_kv_cache_spec(layer: Attention, spec_of: Callable[[Any], Any]) -> None:
    """Make vLLM size the cache of `layer` by `spec_of(vllm_config)`.

    From 0.32 on nothing is to be done: vLLM asks the `customize_spec` of the layer's backend.
    """
    if not backends_size_pages():
        layer.get_kv_cache_spec = spec_of


def kv_cache_layouts() -> tuple[Any, ...]:
    """The orders of dimensions in which the bytes of one block and head are contiguous (0.32+).

    BLHNC has all layers of a block side by side, which vLLM needs for models that mix page sizes
    and sliding windows, and which KV connectors prefer.
    """
    from vllm.v1.kv_cache_layout import KVCacheLayout

    return KVCacheLayout.LBHNC, KVCacheLayout.BLHNC
