"""Perplexity of a set in plain transformers, before any kernel is involved.

Weights are dequantized, the inputs of quantized layers rounded to int8 per token
where the set says so, and the KV cache is simulated: keys (after RoPE) and values
are rounded to 4 or 8 bits each, per token and head. The protocol is that of
`vllm_qoq.bench.perplexity`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vllm_qoq.checkpoint.kv_config import UNQUANTIZED, Bits
from vllm_qoq.models.table import LayerNames
from vllm_qoq.numerics import kv_layout
from vllm_qoq.numerics.kv_layout import QuantizedBits
from vllm_qoq.numerics.reference import INT8_MAX, MIN_SCALE
from vllm_qoq.numerics.reference_attention import hadamard
from vllm_qoq.quantizer.attention import capped
from vllm_qoq.quantizer.model import Module, blocks
from vllm_qoq.quantizer.rounding_plain import one_thread

_ATTENTION = "qoq_simulated_kv"
_LARGEST_EXPONENT = 700  # beyond which exp overflows
_CACHED_VALUES = 1 << 16  # float32 values that stay in a core's cache


@torch.no_grad()
def perplexity(
    model: Module,
    windows: Iterable[list[int]],
    kv_bits: Bits = UNQUANTIZED,
    done: Callable[[], object] = lambda: None,
    kv_hadamard: bool = False,
    k_means: Mapping[int, torch.Tensor] | None = None,
) -> float:
    """Measure the perplexity of a model on windows of token ids.

    This is exp of the mean negative log-likelihood of every token but the first of each window.
    `kv_hadamard` rotates keys before they are rounded to `kv_bits`, and `k_means`, float32
    [kv_heads, head_dim] by the index of the layer, are subtracted before that; `done` is called
    after each window.
    """
    device = device_of(model)
    total, count = 0.0, 0
    with _simulated_cache(model, kv_bits, kv_hadamard, k_means):
        for window in windows:
            tokens = torch.tensor([window], device=device)
            logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
            losses = nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
            total, count = total + float(losses), count + len(window) - 1
            done()
    mean = total / count
    return math.inf if mean > _LARGEST_EXPONENT else math.exp(mean)


def device_of(model: Module) -> torch.device:
    """The device on which the model computes, also if its weights are kept elsewhere."""
    from compressed_tensors.offload import get_execution_device

    return get_execution_device(model.get_input_embeddings())


def linears(model: Module, names: LayerNames) -> Iterator[Module]:
    """The layers that every set quantizes."""
    return (
        block.get_submodule(name)
        for index, block in enumerate(blocks(model, names))
        for name in names.of_block(index).linears
    )


@contextmanager
def int8_inputs(layers: Iterable[Module]) -> Iterator[None]:
    """Round the inputs of `layers` to int8 per token while the block runs."""
    rounded = RoundedInputs()
    hooks = [layer.register_forward_pre_hook(rounded) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class RoundedInputs:
    """A forward pre-hook that rounds the inputs of layers to int8 per token and back.

    Layers that get one tensor in turn, such as q, k and v, share the result: one of these objects
    serves all layers of a model, and holds no more than the last input.
    """

    def __init__(self) -> None:
        self._given, self._rounded = torch.empty(0), torch.empty(0)

    def __call__(self, module: Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Replace the input float [..., K] of `module`."""
        if args[0] is not self._given:
            self._given, self._rounded = args[0], to_int8(args[0])
        return (self._rounded, *args[1:])


@one_thread()
def to_int8(x: torch.Tensor) -> torch.Tensor:
    """Round the input [..., K] of a layer to int8 per token and back, in its dtype.

    This is `quantize_per_token` without its codes, which a CPU makes several times as fast.
    """
    tokens = x.flatten(0, -2)
    rounded = torch.empty(tokens.shape, dtype=x.dtype, device=x.device)
    rows = max(1, len(tokens) if x.is_cuda else _CACHED_VALUES // x.shape[-1])
    for part, out in zip(tokens.split(rows), rounded.split(rows), strict=True):
        values = part.to(torch.float32, copy=True)
        largest = values.abs().amax(dim=-1, keepdim=True)
        scale = (largest / INT8_MAX).clamp_min(MIN_SCALE)
        out.copy_(values.div_(scale).round_().mul_(scale))
    return rounded.view(x.shape)


def round_cache(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Round keys or values [..., D] as the cache does; the result has their dtype."""
    return kv_layout.dequantize(*kv_layout.quantize(x, bits)).to(x.dtype)


def round_keys(keys: torch.Tensor, bits: int, use_hadamard: bool) -> torch.Tensor:
    """Round keys [..., D] after RoPE as the cache does, which may rotate them before."""
    if not use_hadamard:
        return round_cache(keys, bits)
    return hadamard(round_cache(hadamard(keys), bits)).to(keys.dtype)


class _simulated_cache:
    """A context in which the attention of `model` rounds keys and values."""

    def __init__(
        self,
        model: Module,
        bits: Bits,
        use_hadamard: bool,
        k_means: Mapping[int, torch.Tensor] | None,
    ) -> None:
        self.model, self.bits, self.use_hadamard = model, bits, use_hadamard
        self.k_means = k_means

    def __enter__(self) -> None:
        self.before = self.model.config._attn_implementation
        if self.bits != UNQUANTIZED:
            name = _register(self.bits, self.use_hadamard, self.k_means)
            self.model.set_attn_implementation(name)

    def __exit__(self, *error: object) -> None:
        self.model.set_attn_implementation(self.before)


def _register(
    bits: QuantizedBits, use_hadamard: bool, k_means: Mapping[int, torch.Tensor] | None
) -> str:
    """Make an attention that rounds keys and values known to transformers; returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    key_bits, value_bits = kv_layout.widths(bits)

    def attention(
        module: Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        keys, values = key, round_cache(value, value_bits)
        if k_means is not None:  # [kv_heads, 1, head_dim], for keys [1, kv_heads, tokens, head_dim]
            keys = key.float() - k_means[module.layer_idx].to(key.device)[:, None]
        keys = round_keys(keys, key_bits, use_hadamard).to(key.dtype)
        if options.get("softcap") is not None:
            scaling, softcap = options["scaling"], options["softcap"]
            return capped(query, keys, values, mask, scaling, softcap), None
        return sdpa_attention_forward(module, query, keys, values, mask, **options)

    name = f"{_ATTENTION}{bits}{'_hadamard' if use_hadamard else ''}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name
