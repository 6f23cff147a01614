"""Smoothing: scales and orders of channels that leave the model's function as it is.

SmoothAttention divides the channels of K, and multiplies those of Q, by a scale
that K's large channels ask for. RoPE mixes the channels of a pair (`rope`), so the
two share a scale. Where a norm follows k_proj, its weight takes the scale: for all
heads alike (Qwen 3), or of each its own, if the norm has a weight for every channel
of all heads (OLMo 2). A norm that multiplies by 1 + w (Gemma 3) stores w in few bits, of
which almost none are left where 1 + w is far below 1, so scales do not take it there.

Outputs of a block are smoothed in its last products: v_proj's rows are divided by a
scale and o_proj's columns multiplied, and up_proj's and down_proj's likewise. Linear attention
norms what its heads give, with one weight for all of them, which takes the scale. `order`
sorts the inputs of down_proj by magnitude, so that a group holds channels of one
size. Every expert has scales and an order of its own. These are QServe's steps (arXiv
2405.04532); `strength` chooses the scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from vllm_qoq.checkpoint.format import K_MEAN
from vllm_qoq.models.blocks import Mlp
from vllm_qoq.models.table import LayerNames
from vllm_qoq.quantizer import k_mean, strength
from vllm_qoq.quantizer.model import Dimensions, Module
from vllm_qoq.quantizer.parts import gate_and_up, rows
from vllm_qoq.quantizer.rope import Rope
from vllm_qoq.quantizer.weights import Rows, assign


@dataclass(frozen=True)
class SmoothOptions:
    """The options of smoothing, with the precisions that the scales are chosen for.

    k_mean     whether the cache leaves out the mean of K
    attention  whether K gets SmoothAttention
    outputs    whether the inputs of o_proj and down_proj are smoothed
    reorder    whether the inputs of down_proj are sorted
    """

    k_mean: bool
    attention: bool
    outputs: bool
    reorder: bool
    key_bits: int
    weight_bits: int
    group_size: int
    kv_hadamard: bool = False


@dataclass(frozen=True)
class SeenDown:
    """What the calibration text showed of the inputs of a down_proj, or of a layer like it.

    inputs   float [tokens, K], a sample
    largest  float32 [K]: largest magnitudes
    """

    inputs: torch.Tensor
    largest: torch.Tensor


@dataclass(frozen=True)
class SeenAttention:
    """The magnitudes and samples that the calibration text showed of the attention of a block.

    Keys and pairs of queries are in the order of `Rope.paired`.

    keys         float [tokens, kv_heads, head_dim] before RoPE, a sample
    positions    int64 [tokens] of these keys in their pieces of text
    mean_key     float64 [kv_heads, head_dim]: mean of all keys before RoPE
    query_pairs  float32 [kv_heads, head_dim / 2]: root mean square of the queries' pairs
    values       float32 [kv_heads, head_dim]: root mean square
    """

    keys: torch.Tensor
    positions: torch.Tensor
    mean_key: torch.Tensor
    query_pairs: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class Seen:
    """What the calibration text showed of one block.

    attention  of its keys and values; None where linear attention has none
    downs      what the layers that `BlockNames.smoothed` lists got, by their names; experts without
               a token are left out
    """

    attention: SeenAttention | None
    downs: Mapping[str, SeenDown]

    def tensors(self) -> Iterator[torch.Tensor]:
        """Go through all that was seen."""
        seen = self.attention
        if seen is not None:
            yield from (seen.keys, seen.mean_key, seen.query_pairs, seen.values)
        for down in self.downs.values():
            yield from (down.inputs, down.largest)


@torch.no_grad()
def transforms(
    seen: Seen,
    block: Module,
    names: LayerNames,
    dimensions: Dimensions,
    rope: Rope | None,
    options: SmoothOptions,
) -> dict[str, torch.Tensor]:
    """Find the tensors that `apply` needs for one block, those that `options` ask for.

    The results are, where there are keys and values,

    k_mean       float32 [kv_heads, head_dim], of the keys after RoPE that `apply` leaves; it needs
                 nothing of this one, which is for the checkpoint
    key_scale    float32 [kv_heads, head_dim], the same for both channels of a pair
    value_scale  float32 [kv_heads, head_dim]

    and with the name of a layer of `BlockNames.smoothed` and a dot in front, of each

    scale        float32 [K], in linear attention the same for all heads
    order        int64 [K], where it is a down_proj
    """
    found = {}
    if seen.attention is not None and rope is not None:
        found = _of_attention(seen.attention, block, names, dimensions, rope, options)
    for name, down in seen.downs.items():
        heads = _linear_heads(block, names, name)
        if options.outputs:
            found[f"{name}.scale"] = strength.down_scale(
                down.inputs,
                down.largest,
                block.get_submodule(name).weight.detach(),
                options.weight_bits,
                options.group_size,
                heads or 1,
            )
        if options.reorder and heads is None:
            scaled = down.largest / found.get(f"{name}.scale", 1)
            found[f"{name}.order"] = scaled.argsort(descending=True)
    return found


def _linear_heads(block: Module, names: LayerNames, layer: str) -> int | None:
    """Count the heads whose outputs linear attention writes with `layer`; None for any other."""
    if names.linear is None or layer != names.linear.o:
        return None
    of_head: int = block.get_submodule(names.linear.norm).weight.numel()
    inputs: int = block.get_submodule(layer).weight.shape[1]
    return inputs // of_head


def _of_attention(
    seen: SeenAttention,
    block: Module,
    names: LayerNames,
    dimensions: Dimensions,
    rope: Rope,
    options: SmoothOptions,
) -> dict[str, torch.Tensor]:
    found = {}
    if options.k_mean:
        inv_freq = rope.inv_freq.to(seen.mean_key.device)
        found["k_mean"] = k_mean.after_rope(seen.mean_key, inv_freq, rope.longest)
    if options.attention:
        keys = strength.with_rope(
            seen.keys, seen.positions, rope.inv_freq.to(seen.keys.device)
        ) - found.get("k_mean", 0)
        scaling = rope.scaling.to(keys.device)
        keys = keys * scaling.repeat(2)
        queries = seen.query_pairs * scaling
        if _has_common_norm(block, names, dimensions):
            keys = keys.flatten(0, 1)[:, None]
            queries = queries.square().mean(dim=0, keepdim=True).sqrt()
        limits = _limits(block, names, rope)
        scale = strength.key_scale(keys, queries, options.key_bits, options.kv_hadamard, limits)
        found["key_scale"] = rope.of_channels(scale.expand(dimensions.kv_heads, -1))
    if options.k_mean:
        scaling = rope.scaling.to(found["k_mean"].device).repeat(2)
        found["k_mean"] = rope.of_model(found["k_mean"] * scaling)
        if options.attention:
            found["k_mean"] /= found["key_scale"]
    if options.outputs:
        readers = block.get_submodule(names.o).weight.detach().float().square().sum(dim=0)
        readers = readers.view(dimensions.kv_heads, dimensions.queries_per_kv, -1).sum(dim=1).sqrt()
        found["value_scale"] = strength.value_scale(seen.values, readers)
    return found


def k_means(found: Mapping[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Take the means of K, by the index of the block, from the transforms of all blocks."""
    places = ((key.partition("."), mean) for key, mean in found.items())
    return {int(index): mean for (index, _, name), mean in places if name == K_MEAN}


def named_means(means: Mapping[int, torch.Tensor], names: LayerNames) -> dict[str, torch.Tensor]:
    """Name the means of K of the blocks as the checkpoint does."""
    return {
        f"{names.blocks}.{index}.{names.attention}.{K_MEAN}": mean for index, mean in means.items()
    }


@torch.no_grad()
def apply(
    block: Module,
    found: Mapping[str, torch.Tensor],
    names: LayerNames,
    dimensions: Dimensions,
    mlps: Iterable[Mlp],
) -> None:
    """Change the weights of one block; its function stays, but for rounding to their dtype.

    mlps  those of the block
    """
    if "key_scale" in found:
        _smooth_keys(block, found["key_scale"].double(), names, dimensions)
    if "value_scale" in found:
        scale = found["value_scale"].double()
        _scale_rows(rows(block, "v", names, dimensions), 1 / scale.flatten())
        per_head = scale.repeat_interleave(dimensions.queries_per_kv, dim=0)
        _scale_columns(block.get_submodule(names.o), per_head.flatten())
    if names.linear is not None and f"{names.linear.o}.scale" in found:
        scale = found[f"{names.linear.o}.scale"].double()
        norm = block.get_submodule(names.linear.norm)
        _scale_vector(norm, 1 / scale[: norm.weight.numel()], offset=0.0)
        _scale_columns(block.get_submodule(names.linear.o), scale)
    for mlp in mlps:
        if f"{mlp.down}.scale" in found:
            scale = found[f"{mlp.down}.scale"].double()
            _, up = gate_and_up(block, mlp)
            _scale_rows(up, 1 / scale)
            _scale_columns(block.get_submodule(mlp.down), scale)
        if f"{mlp.down}.order" in found:
            _reorder(block, found[f"{mlp.down}.order"], mlp)


def _has_common_norm(block: Module, names: LayerNames, dimensions: Dimensions) -> bool:
    """Whether norms follow q_proj and k_proj whose weights are the same for all heads."""
    if names.q_norm is None:
        return False
    # There may be one head of K, but then there are more of Q, or all is the same.
    size: int = block.get_submodule(names.q_norm).weight.numel()
    return size == dimensions.head_dim


def _limits(
    block: Module, names: LayerNames, rope: Rope
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Find the least and the largest scale of each pair, float32 [head_dim / 2]; None for any.

    With these, what the norms of K and Q multiply by stays above a half of what they add to their
    weights, or where it is. There, rounding the weights costs no more than rounding the products.
    """
    if names.q_norm is None or names.k_norm is None or not names.norm_offset:
        return None
    room = []
    for name in (names.q_norm, names.k_norm):
        factors = block.get_submodule(name).weight.detach().float() + names.norm_offset
        of_pairs = rope.paired(factors.abs()).unflatten(-1, (2, -1)).amin(dim=-2)
        room.append((of_pairs / (names.norm_offset / 2)).clamp_min(1))
    return 1 / room[0], room[1]


def _smooth_keys(
    block: Module, scale: torch.Tensor, names: LayerNames, dimensions: Dimensions
) -> None:
    per_head = scale.repeat_interleave(dimensions.queries_per_kv, dim=0)
    if names.k_norm is not None and names.q_norm is not None:
        if _has_common_norm(block, names, dimensions):
            scale = per_head = scale[0]
        offset = names.norm_offset
        _scale_vector(block.get_submodule(names.k_norm), 1 / scale.flatten(), offset)
        _scale_vector(block.get_submodule(names.q_norm), per_head.flatten(), offset)
        return
    _scale_rows(rows(block, "k", names, dimensions), 1 / scale.flatten())
    _scale_rows(rows(block, "q", names, dimensions), per_head.flatten())


def _reorder(block: Module, order: torch.Tensor, mlp: Mlp) -> None:
    for part in gate_and_up(block, mlp):
        weight, bias = part.weight, part.bias
        part.assign("weight", weight[order.to(weight.device)].contiguous())
        if bias is not None:
            part.assign("bias", bias[order.to(bias.device)].contiguous())
    down = block.get_submodule(mlp.down)
    assign(down, "weight", down.weight.data[:, order.to(down.weight.device)].contiguous())


def _scale_vector(norm: Module, factor: torch.Tensor, offset: float) -> None:
    weight = norm.weight.data
    scaled = (weight.double() + offset) * factor.to(weight.device) - offset
    assign(norm, "weight", scaled.to(weight.dtype))


def _scale_rows(part: Rows, factor: torch.Tensor) -> None:
    weight, bias = part.weight, part.bias
    factor = factor.to(weight.device)
    part.assign("weight", (weight.double() * factor[:, None]).to(weight.dtype))
    if bias is not None:
        part.assign("bias", (bias.double() * factor).to(bias.dtype))


def _scale_columns(layer: Module, factor: torch.Tensor) -> None:
    weight = layer.weight.data
    assign(layer, "weight", (weight.double() * factor.to(weight.device)).to(weight.dtype))
