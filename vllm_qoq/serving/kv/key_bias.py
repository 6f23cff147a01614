"""A warning, once weights are loaded, of layers whose K bias a quantized cache cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from vllm_qoq.checkpoint.kv_config import UNQUANTIZED, Bits
from vllm_qoq.numerics import key_bias
from vllm_qoq.numerics.kv_layout import widths

logger = init_logger("vllm." + __name__)

_SWITCH = """--additional-config '{"qoq": {"kv_hadamard": true}}'"""


class KeyBiasWatch:
    """The projections to Q, K and V of one engine, until they are looked at."""

    def __init__(self) -> None:
        self._layers: dict[str, tuple[QKVParallelLinear, nn.Module | None]] = {}

    def add(self, layer: nn.Module, prefix: str, owner: nn.Module | None) -> None:
        """Remember `layer`, of any kind and without weights yet, if it makes keys.

        owner  the module that has it, which need not be whole yet
        """
        if isinstance(layer, QKVParallelLinear):
            self._layers[prefix] = (layer, owner)

    def warn(self, bits_of: Mapping[str, Bits], use_hadamard: bool) -> None:
        """Log the layers whose bias is too large, a line for each precision; then forget them.

        `bits_of` has the bits of every attention layer, which is beside its projections. Call when
        the weights are in the form that the layers compute with.
        """
        beside = {name.rpartition(".")[0]: bits for name, bits in bits_of.items()}
        found: dict[int, list[str]] = {}
        for prefix, (layer, owner) in self._layers.items():
            cache_bits = beside.get(prefix.rpartition(".")[0], UNQUANTIZED)
            if cache_bits == UNQUANTIZED or not layer.has_bias:
                continue
            bits = widths(cache_bits).key
            if _is_too_large(layer, _rotary_of(owner), bits, use_hadamard):
                found.setdefault(bits, []).append(prefix)
        self._layers.clear()
        for bits, names in found.items():
            ways = ["measure the mean of K with `vllm-qoq calibrate-kv`, or quantize the model"]
            ways += [] if use_hadamard else [f"rotate them with {_SWITCH}"]
            ways += ["use kv_bits 8 or k8v4" if bits == 4 else "use kv_bits 16"]
            logger.warning("%s", key_bias.warning(names, bits, ", or ".join(ways)))


def _rotary_of(owner: nn.Module | None) -> dict[str, Any]:
    """Read which channels of a head RoPE turns, as `key_bias.turned` takes it, beside q, k and v.

    Where there is no RoPE of vLLM's, it is taken to turn all of a head.
    """
    for module in owner.children() if owner is not None else ():
        if isinstance(module, RotaryEmbeddingBase):
            return {"rotary_dim": module.rotary_dim, "neighbors": not module.is_neox_style}
    return {}


@torch.no_grad()
def _is_too_large(
    layer: QKVParallelLinear, rotary: dict[str, Any], bits: int, use_hadamard: bool
) -> bool:
    compute = _computation(layer)
    like = next(layer.parameters())
    device = torch.empty(0, dtype=layer.params_dtype, device=like.device)
    x = key_bias.random_inputs(layer.input_size, device)
    # The bias is computed apart, because 16-bit outputs with a large bias have lost what differs
    # between tokens.
    bias = compute(torch.zeros_like(x), True)[0].float()
    rows = compute(x, False).float()
    heads, kv_heads, size = layer.num_heads, layer.num_kv_heads, layer.head_size
    q, k = heads * size, kv_heads * size
    return key_bias.is_too_large(
        (rows[:, :q] + bias[:q]).view(-1, heads, size),
        rows[:, q : q + k].view(-1, kv_heads, size),
        key_bias.turned(bias[q : q + k].view(kv_heads, size), **rotary),
        bits,
        use_hadamard,
    )


def _computation(layer: QKVParallelLinear) -> Callable[[torch.Tensor, bool], torch.Tensor]:
    """Make a function of inputs and `add_bias` that computes the layer outside of a step.

    It needs no forward context of vLLM, so it can run while a model is loaded.
    """
    from vllm_qoq.serving.methods.routed_linear import FlexLinearMethod

    method: Any = layer.quant_method
    if isinstance(method, FlexLinearMethod):
        weights = method.weights(next(iter(method.sets)))  # all sets have one bias and nearly one W
        return lambda x, has_bias: weights.apply(x, has_bias)
    return lambda x, has_bias: method.apply(layer, x, layer.bias if has_bias else None)
