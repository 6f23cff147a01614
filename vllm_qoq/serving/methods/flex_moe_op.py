"""The ops `qoq::flex_moe` and `qoq::flex_moe_monolithic`, in which the set of experts is chosen.

On GPUs vLLM's own op around a mixture of experts hides the choice from torch.compile already. On a
CPU vLLM goes without that op, and a choice in Python would be frozen to the profiling run's.
"""

from __future__ import annotations

import torch
from torch.library import Library
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_qoq.serving.vllm_versions import LayerNameType, resolve_layer_name


def flex_moe(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    out_features: int,
    layer_name: LayerNameType,
) -> torch.Tensor:
    """Compute the weighted sum of the chosen experts' outputs, with the set of this step.

    x             [tokens, hidden]    what the experts read
    topk_weights  float32 [tokens, k]
    topk_ids      int [tokens, k]     global numbers of experts
    out_features  width of the output
    layer_name    the key of the layer in vLLM's forward context
    """
    context = get_forward_context()
    layer = context.no_compile_layers[resolve_layer_name(layer_name)]
    return layer.quant_method.run(context, x, topk_weights, topk_ids)


def _flex_moe_fake(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    out_features: int,
    layer_name: LayerNameType,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def flex_moe_monolithic(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    input_ids: torch.Tensor | None,
    out_features: int,
    layer_name: LayerNameType,
) -> torch.Tensor:
    """Compute `flex_moe` with kernels that choose the experts themselves.

    router_logits  [tokens, experts]
    input_ids      [tokens], for routers that go by them
    """
    context = get_forward_context()
    layer = context.no_compile_layers[resolve_layer_name(layer_name)]
    return layer.quant_method.run_monolithic(context, x, router_logits, input_ids)


def _flex_moe_monolithic_fake(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    input_ids: torch.Tensor | None,
    out_features: int,
    layer_name: LayerNameType,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


# The ops live as long as this object.
_library = Library("qoq", "FRAGMENT")
direct_register_custom_op("flex_moe", flex_moe, fake_impl=_flex_moe_fake, target_lib=_library)
direct_register_custom_op(
    "flex_moe_monolithic",
    flex_moe_monolithic,
    fake_impl=_flex_moe_monolithic_fake,
    target_lib=_library,
)
