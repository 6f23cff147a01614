"""Check of the key biases: which are so large that a quantized cache cannot hold the keys."""

from __future__ import annotations

import torch

from vllm_qoq.models.table import LayerNames
from vllm_qoq.numerics import key_bias
from vllm_qoq.quantizer.model import Dimensions, Module, blocks
from vllm_qoq.quantizer.options import QuantizeOptions


@torch.no_grad()
def large_biases(
    model: Module, names: LayerNames, dimensions: Dimensions, bits: int, use_hadamard: bool
) -> list[str]:
    """Name the k_proj layers whose bias is too large for a cache of `bits`.

    The model must be as it will be quantized, with rotations and scales.
    """
    if bits == 16 or names.k_norm is not None:  # A norm evens the bias out.
        return []
    found = []
    for index, block in enumerate(blocks(model, names)):
        q, k = block.get_submodule(names.q), block.get_submodule(names.k)
        if k.bias is None:
            continue
        weight = k.weight.data.float()
        gain = block.get_submodule(names.attention_norm).weight.data.to(weight)
        x = key_bias.random_inputs(dimensions.hidden, weight) * gain
        queries = x @ q.weight.data.to(weight).t()
        if q.bias is not None:
            queries = queries + q.bias.data.to(weight)
        if key_bias.is_too_large(
            queries.view(-1, dimensions.heads, dimensions.head_dim),
            (x @ weight.t()).view(-1, dimensions.kv_heads, dimensions.head_dim),
            k.bias.data.to(weight).view(dimensions.kv_heads, dimensions.head_dim),
            bits=bits,
            use_hadamard=use_hadamard,
        ):
            found.append(f"{names.blocks}.{index}.{names.k}")
    return found


def warning(layers: list[str], options: QuantizeOptions) -> str:
    """Write the warning about `large_biases`."""
    ways = [] if options.smooth_attention else ["do not leave out SmoothAttention"]
    ways += [] if options.kv_hadamard else ["rotate the keys with --kv-hadamard"]
    ways += ["give --kv-bits 8" if options.kv_bits == 4 else "give --kv-bits 16"]
    return key_bias.warning(layers, options.kv_bits, ", or ".join(ways))
