"""The ops `qoq::flex_linear` and `qoq::flex_linear_int8`, in which a layer's set is chosen.

vLLM traces a model once and drops guards, so a Python branch in a layer would
be frozen to what the profiling run took. Inside an op the branch runs at every
step that is not a graph replay, and a CUDA graph captures the one branch that
belongs to its key.
"""

from __future__ import annotations

import torch
from torch.library import Library
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_qoq.serving.vllm_versions import LayerNameType, resolve_layer_name


def flex_linear(
    x: torch.Tensor,
    scaled: list[torch.Tensor],
    add_bias: bool,
    out_features: int,
    layer_name: LayerNameType,
) -> torch.Tensor:
    """Compute y = x @ W.T (+ bias) with the weights of the set that this step uses.

    x             [..., in_features]   this rank's slice of the input
    scaled        x * input_ratio, like x, for each set of the layer that has a ratio
    add_bias      whether this rank adds the layer's bias
    out_features  this rank's width of the output
    layer_name    the key of the layer in vLLM's forward context
    """
    context = get_forward_context()
    layer = context.no_compile_layers[resolve_layer_name(layer_name)]
    return layer.quant_method.run(x, scaled, add_bias, context)


def _flex_linear_fake(
    x: torch.Tensor,
    scaled: list[torch.Tensor],
    add_bias: bool,
    out_features: int,
    layer_name: LayerNameType,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def flex_linear_int8(
    codes: torch.Tensor,
    scale: torch.Tensor,
    row_sum: torch.Tensor,
    out_dtype: torch.dtype,
    add_bias: bool,
    out_features: int,
    layer_name: LayerNameType,
) -> torch.Tensor:
    """Compute `flex_linear` of a layer whose sets all read what `qoq::quantize_per_token` writes.

    The quantization is outside, so that the kernel of the norm or SiLU before can do it.

    codes, scale, row_sum   int8 [M, in_features], float32 [M], int32 [M]
    out_dtype               the dtype of the output [M, out_features]
    """
    context = get_forward_context()
    layer = context.no_compile_layers[resolve_layer_name(layer_name)]
    return layer.quant_method.run_int8((codes, scale, row_sum), out_dtype, add_bias, context)


def _flex_linear_int8_fake(
    codes: torch.Tensor,
    scale: torch.Tensor,
    row_sum: torch.Tensor,
    out_dtype: torch.dtype,
    add_bias: bool,
    out_features: int,
    layer_name: LayerNameType,
) -> torch.Tensor:
    return codes.new_empty((codes.shape[0], out_features), dtype=out_dtype)


# The ops live as long as this object.
_library = Library("qoq", "FRAGMENT")
direct_register_custom_op(
    "flex_linear", flex_linear, fake_impl=_flex_linear_fake, target_lib=_library
)
direct_register_custom_op(
    "flex_linear_int8", flex_linear_int8, fake_impl=_flex_linear_int8_fake, target_lib=_library
)
