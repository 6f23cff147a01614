"""Scales and orders of channels that the quantizers see and the model's function does not.

SmoothAttention divides the channels of K, and multiplies those of Q, by a scale
that K's large channels ask for. RoPE mixes channel i with i + D/2 of a head, so the
two share a scale; the magnitude of such a pair does not change under RoPE, so it is
measured before. Where a norm follows k_proj (Qwen3), its weight takes the scale, for
all heads alike.

Output smoothing divides the inputs of down_proj by a scale and multiplies
up_proj's rows by less. `order` sorts the inputs of down_proj by magnitude, so that
a group of 128 holds channels of one size. Both are QServe's (arXiv 2405.04532).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_qoq.quantize.architectures import Architecture, Module, Shape
from vllm_qoq.quantize.weights import assign

_TINY = 1e-5


@dataclass(frozen=True)
class SmoothOptions:
    """Strengths, 0 for none.

    attention  exponent of K's magnitude in its scale
    output     exponent of the activations' magnitude in the scale of down_proj's inputs
    reorder    whether to sort down_proj's inputs
    """

    attention: float = 0.5
    output: float = 0.0
    reorder: bool = True


@dataclass
class Magnitudes:
    """What the calibration text showed of one block, largest absolute values.

    key_pairs  float32 [kv_heads, head_dim / 2]: sqrt(k_i^2 + k_(i + D/2)^2)
    down       float32 [intermediate]: the inputs of down_proj
    """

    key_pairs: torch.Tensor
    down: torch.Tensor


def key_pair_magnitude(keys: torch.Tensor, shape: Shape) -> torch.Tensor:
    """float32 [kv_heads, head_dim / 2] of keys before RoPE, [..., kv_heads * head_dim] or
    [..., kv_heads, head_dim]."""
    halves = keys.float().reshape(-1, shape.kv_heads, 2, shape.head_dim // 2)
    return halves.norm(dim=2).amax(dim=0)


def transforms(
    seen: Magnitudes, block: Module, arch: Architecture, options: SmoothOptions
) -> dict[str, torch.Tensor]:
    """The tensors that `apply` needs, for one block.

    key_scale   float32 [kv_heads, head_dim / 2]
    down_scale  float32 [intermediate]
    down_order  int64 [intermediate], only with `reorder`
    """
    pairs = seen.key_pairs
    if arch.k_norm is not None:  # one weight for all heads
        pairs = pairs.amax(dim=0, keepdim=True).expand_as(pairs)
    down_weight = block.get_submodule(arch.down).weight.detach().float().abs().amax(dim=0)
    found = {
        "key_scale": _scale(pairs, options.attention),
        "down_scale": _scale(seen.down, options.output)
        / _scale(down_weight, 1 - options.output if options.output else 0.0),
    }
    if options.reorder:
        found["down_order"] = (seen.down / found["down_scale"]).argsort(descending=True)
    return found


@torch.no_grad()
def apply(block: Module, found: dict[str, torch.Tensor], arch: Architecture, shape: Shape) -> None:
    """Change the weights of one block. The function stays, but for rounding to their dtype."""
    _smooth_keys(block, found["key_scale"].double(), arch, shape)
    scale = found["down_scale"].double()
    _scale_rows(block.get_submodule(arch.up), 1 / scale)
    _scale_columns(block.get_submodule(arch.down), scale)
    if "down_order" in found:
        order = found["down_order"]
        for name in (arch.gate, arch.up):
            layer = block.get_submodule(name)
            assign(layer, "weight", layer.weight.data[order.to(layer.weight.device)].contiguous())
            if layer.bias is not None:
                assign(layer, "bias", layer.bias.data[order.to(layer.bias.device)].contiguous())
        down = block.get_submodule(arch.down)
        assign(down, "weight", down.weight.data[:, order.to(down.weight.device)].contiguous())


def _smooth_keys(block: Module, scale: torch.Tensor, arch: Architecture, shape: Shape) -> None:
    per_kv_head = torch.cat((scale, scale), dim=1)  # both halves of each pair
    if arch.k_norm is not None and arch.q_norm is not None:
        _scale_vector(block.get_submodule(arch.k_norm), 1 / per_kv_head[0])
        _scale_vector(block.get_submodule(arch.q_norm), per_kv_head[0])
        return
    _scale_rows(block.get_submodule(arch.k), 1 / per_kv_head.flatten())
    per_head = per_kv_head.repeat_interleave(shape.queries_per_kv, dim=0)
    _scale_rows(block.get_submodule(arch.q), per_head.flatten())


def _scale(magnitude: torch.Tensor, strength: float) -> torch.Tensor:
    """magnitude ** strength, with a geometric mean of 1 so that nothing grows as a whole."""
    logarithm = magnitude.float().clamp_min(_TINY).log() * strength
    return (logarithm - logarithm.mean()).exp()


def _scale_vector(norm: Module, factor: torch.Tensor) -> None:
    weight = norm.weight.data
    assign(norm, "weight", (weight.double() * factor.to(weight.device)).to(weight.dtype))


def _scale_rows(layer: Module, factor: torch.Tensor) -> None:
    weight = layer.weight.data
    factor = factor.to(weight.device)
    assign(layer, "weight", (weight.double() * factor[:, None]).to(weight.dtype))
    if layer.bias is not None:
        assign(layer, "bias", (layer.bias.data.double() * factor).to(layer.bias.dtype))


def _scale_columns(layer: Module, factor: torch.Tensor) -> None:
    weight = layer.weight.data
    assign(layer, "weight", (weight.double() * factor.to(weight.device)).to(weight.dtype))
