"""What vllm-qoq takes from vLLM beyond its public interface, and every branch on a version.

Served: vLLM 0.26 to 0.33, where all of this is the same, so there is no branch
today. A name that a newer version moves or drops is probed for here, and
nowhere else; tests/test_vllm_sources.py imports this package against the oldest
and the newest version.

* `encode_layer_name`, `resolve_layer_name`, `LayerNameType`: how a custom op
  receives the name of its layer as a graph input, so that torch.compile reuses
  one graph for all layers (vllm.utils.torch_utils).
* `has_loader_v2`: vLLM picks the loader of a linear layer by the class name of
  its quantization method (vllm.model_executor.layers.linear).
* `InductorPass`, `enable_fake_mode`: a pass of ours over vLLM's compiled graphs, which runs under
  the platform's `pass_key` of `inductor_compile_config` (vllm.compilation.passes).
* `fused_add_rms_norm`: how such a graph spells the norm (vllm.ir).
* `device_view`: host memory as the GPU sees it (vllm.utils.torch_utils).
"""

from __future__ import annotations

import torch
from vllm import ir
from vllm.compilation.passes.inductor_pass import InductorPass, enable_fake_mode
from vllm.model_executor.layers.linear import WEIGHT_LOADER_V2_SUPPORTED, LinearMethodBase
from vllm.utils.torch_utils import (
    LayerNameType,
    get_accelerator_view_from_cpu_tensor,
)
from vllm.utils.torch_utils import _encode_layer_name as encode_layer_name
from vllm.utils.torch_utils import _resolve_layer_name as resolve_layer_name

__all__ = [
    "InductorPass",
    "LayerNameType",
    "device_view",
    "enable_fake_mode",
    "encode_layer_name",
    "fused_add_rms_norm",
    "has_loader_v2",
    "resolve_layer_name",
]

fused_add_rms_norm = ir.ops.fused_add_rms_norm.torch_op

_REGISTER_PORTABLE_AND_MAPPED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped


def has_loader_v2(method: LinearMethodBase) -> bool:
    """Whether the parameters of `method` expect the layer's `weight_loader_v2`."""
    return type(method).__name__ in WEIGHT_LOADER_V2_SUPPORTED


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
