"""Check of the key biases: which are so large that a quantized cache cannot hold the keys."""

from __future__ import annotations

import torch

from vllm_qoq.models.table import LayerNames
from vllm_qoq.numerics import key_bias
from vllm_qoq.quantizer import k_mean
from vllm_qoq.quantizer.model import Dimensions, Module, blocks
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.strength import with_rope


@torch.no_grad()
def large_biases(
    model: Module, names: LayerNames, dimensions: Dimensions, options: QuantizeOptions
) -> list[str]:
    """Name the k_proj layers whose bias is too large for the cache that `options` ask for.

    The model must be as it will be quantized, with rotations and scales.
    """
    if not options.is_cache_quantized or names.k_norm is not None:  # A norm evens the bias out.
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
        bias = k.bias.data.to(weight).view(dimensions.kv_heads, dimensions.head_dim)
        if key_bias.is_too_large(
            queries.view(-1, dimensions.heads, dimensions.head_dim),
            (x @ weight.t()).view(-1, dimensions.kv_heads, dimensions.head_dim),
            _left_of(bias, model, names) if options.k_mean else key_bias.turned(bias),
            bits=options.key_bits,
            use_hadamard=bool(options.kv_hadamard),
        ):
            found.append(f"{names.blocks}.{index}.{names.k}")
    return found


def _left_of(bias: torch.Tensor, model: Module, names: LayerNames) -> torch.Tensor:
    """Compute what RoPE leaves of a bias [kv_heads, D] around its mean, float32 [TOKENS, ...]."""
    inv_freq = model.get_submodule(names.rotary).inv_freq.float().to(bias.device)
    longest = model.config.max_position_embeddings
    positions = k_mean.sample_positions(key_bias.TOKENS, longest).to(bias.device)
    turned = with_rope(bias.expand(key_bias.TOKENS, -1, -1), positions, inv_freq)
    return turned - k_mean.after_rope(bias, inv_freq, longest)


def warning(layers: list[str], options: QuantizeOptions) -> str:
    """Write the warning about `large_biases`."""
    ways = [] if options.k_mean else ["do not leave out the mean of K"]
    ways += [] if options.smooth_attention else ["do not leave out SmoothAttention"]
    ways += [] if options.kv_hadamard else ["rotate the keys with --kv-hadamard"]
    ways += ["give --kv-bits 8 or k8v4" if options.key_bits == 4 else "give --kv-bits 16"]
    return key_bias.warning(layers, options.key_bits, ", or ".join(ways))
