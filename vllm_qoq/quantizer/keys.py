"""Check of the key biases: which are so large that a quantized cache cannot hold the keys."""

from __future__ import annotations

import torch

from vllm_qoq.models.table import LayerNames
from vllm_qoq.numerics import key_bias
from vllm_qoq.quantizer import k_mean
from vllm_qoq.quantizer.model import Dimensions, Module, blocks
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.parts import Part, rows
from vllm_qoq.quantizer.rope import Rope, rope_of
from vllm_qoq.quantizer.strength import with_rope

_PARTS: tuple[Part, ...] = ("q", "k")


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
        rope = rope_of(model, names, dimensions, index)
        if rope is None:
            continue
        q, k = (rows(block, part, names, dimensions) for part in _PARTS)
        if k.bias is None:
            continue
        weight = k.weight.float()
        x = key_bias.random_inputs(dimensions.hidden, weight)
        if names.attention_norm is not None:
            gain = block.get_submodule(names.attention_norm).weight.data.to(weight)
            x = x * (gain + names.norm_offset)
        queries = x @ q.weight.to(weight).t()
        if q.bias is not None:
            queries = queries + q.bias.to(weight)
        bias = k.bias.to(weight).view(dimensions.kv_heads, dimensions.head_dim)
        if key_bias.is_too_large(
            queries.view(-1, dimensions.heads, dimensions.head_dim),
            (x @ weight.t()).view(-1, dimensions.kv_heads, dimensions.head_dim),
            _turned(bias, rope, options.k_mean),
            bits=options.key_bits,
            use_hadamard=bool(options.kv_hadamard),
        ):
            found.append(f"{names.blocks}.{index}.{names.k}")
    return found


def _turned(bias: torch.Tensor, rope: Rope, has_mean: bool) -> torch.Tensor:
    """Turn a bias [kv_heads, D] as RoPE may, float32 [TOKENS, ...], around its mean if it has one.

    A mean is what the cache leaves out.
    """
    paired, inv_freq = rope.paired(bias), rope.inv_freq.to(bias.device)
    if has_mean:
        positions = k_mean.sample_positions(key_bias.TOKENS, rope.longest).to(bias.device)
        turned = with_rope(paired.expand(key_bias.TOKENS, -1, -1), positions, inv_freq)
        return rope.of_model(turned - k_mean.after_rope(paired, inv_freq, rope.longest))
    is_still = (inv_freq == 0).repeat(2)
    return rope.of_model(torch.where(is_still, paired.float(), key_bias.turned(paired)))


def warning(layers: list[str], options: QuantizeOptions) -> str:
    """Write the warning about `large_biases`."""
    ways = [] if options.k_mean else ["do not leave out the mean of K"]
    ways += [] if options.smooth_attention else ["do not leave out SmoothAttention"]
    ways += [] if options.kv_hadamard else ["rotate the keys with --kv-hadamard"]
    ways += ["give --kv-bits 8 or k8v4" if options.key_bits == 4 else "give --kv-bits 16"]
    return key_bias.warning(layers, options.key_bits, ", or ".join(ways))
