"""The refusals of what the quantized KV cache does not serve, by name and with a remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, cast

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType

from vllm_qoq.checkpoint.kv_config import KVCache
from vllm_qoq.errors import UserError
from vllm_qoq.numerics.kv_layout import BLOCK_MULTIPLE, HEAD_SIZES
from vllm_qoq.ops.kv_ops import MAX_QUERY_LEN
from vllm_qoq.serving.kv.scores import sinks_of, soft_cap_of
from vllm_qoq.serving.speculation import is_draft, most_decode_tokens
from vllm_qoq.serving.vllm_versions import backends_size_pages

REMEDY = 'serve with vLLM\'s own cache: --additional-config \'{"qoq": {"kv_bits": 16}}\''
_LAYER_REMEDY = f"give the layer 16 bits in kv_cache.layers of config.json, or {REMEDY}"


def check_engine(vllm_config: VllmConfig) -> None:
    """Raise UserError for settings of the engine that the quantized cache does not serve."""
    for what, remedy in _engine_obstacles(vllm_config):
        raise UserError(f"the quantized KV cache does not work with {what}; {remedy}, or {REMEDY}")


def check_query_len(vllm_config: VllmConfig) -> None:
    """Raise UserError where a request verifies more tokens than the kernels of a GPU take."""
    is_of_draft = is_draft(vllm_config)
    query_len = most_decode_tokens(vllm_config, is_of_draft)
    if query_len > MAX_QUERY_LEN:
        speculative = vllm_config.speculative_config
        speculated = speculative.num_speculative_tokens
        places = 2 if is_of_draft and speculative.parallel_drafting else 1  # for each of them
        most = speculated + (MAX_QUERY_LEN - query_len) // places
        raise UserError(
            f"the quantized KV cache does not work with {speculated} speculated tokens on a GPU, "
            f"whose kernels take {MAX_QUERY_LEN} new tokens of a request; set "
            f"num_speculative_tokens of --speculative-config to {most} or less, or {REMEDY}"
        )


def check_layer(
    layer: nn.Module,
    prefix: str,
    kv_cache: KVCache,
    of_device: Callable[[Attention], Iterator[str]],
) -> None:
    """Raise UserError for a kind of attention that the quantized cache does not serve.

    of_device  lists what the device does not serve besides
    """
    obstacles = _layer_obstacles(layer, kv_cache.hadamard)
    for what in chain(obstacles, of_device(cast(Attention, layer))):
        raise UserError(f"{prefix}: the quantized KV cache does not serve {what}; {_LAYER_REMEDY}")
    for what in _k_mean_obstacles(layer) if kv_cache.k_mean else ():
        raise UserError(
            f"{prefix}: the quantized KV cache does not serve a mean of K with {what}, "
            f"which see it; quantize the model with --no-k-mean, {_LAYER_REMEDY}"
        )


def check_mixed_windows(kv_cache: KVCache, vllm_config: VllmConfig) -> None:
    """Raise UserError where vLLM cannot give layers with different windows unequal pages."""
    is_mixed = any(rule.bits != kv_cache.bits for rule in kv_cache.layers)
    has_manager = not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    if is_mixed and has_manager and not backends_size_pages():
        raise UserError(
            "a model with sliding windows whose layers differ in kv_cache bits needs vLLM 0.32, or "
            "--disable-hybrid-kv-cache-manager"
        )


def _engine_obstacles(vllm_config: VllmConfig) -> Iterator[tuple[str, str]]:
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    model: Any = vllm_config.model_config
    if cache.cache_dtype != "auto":
        yield f"--kv-cache-dtype {cache.cache_dtype}", "leave it out"
    if cache.user_specified_block_size and cache.block_size % BLOCK_MULTIPLE:
        yield f"--block-size {cache.block_size}", f"use a multiple of {BLOCK_MULTIPLE}"
    if parallel.decode_context_parallel_size > 1:
        yield "--decode-context-parallel-size", "leave it out"
    # Before, the pages of all layers are as long as those of attention in 16 bits would be.
    if model is not None and model.is_hybrid and not backends_size_pages():
        yield f"hybrid models such as {model.model} in this vLLM", "upgrade it to 0.32"
    if model is not None and model.is_mm_prefix_lm:
        yield f"attention in both directions as in {model.model}", "use a causal model"


def _layer_obstacles(layer: Any, use_hadamard: bool) -> Iterator[str]:
    # Subclasses are vLLM's special cases: cross and encoder attention, chunks, static sinks.
    if type(layer) is not Attention:
        yield type(layer).__name__
        return
    if layer.attn_type != AttentionType.DECODER:
        yield f"attention of type {layer.attn_type}"
    if layer.head_size not in HEAD_SIZES:
        yield f"head size {layer.head_size} (it serves {', '.join(map(str, HEAD_SIZES))})"
    if layer.head_size_v != layer.head_size:
        yield f"values of another size than keys, {layer.head_size_v} and {layer.head_size}"
    if use_hadamard and layer.head_size & (layer.head_size - 1):
        yield f"a Hadamard rotation of head size {layer.head_size}, which is no power of two"
    if layer.kv_sharing_target_layer_name is not None:
        yield f"a cache shared with {layer.kv_sharing_target_layer_name}"
    if getattr(layer.impl, "alibi_slopes", None) is not None or layer.use_alibi_sqrt:
        yield "ALiBi"


def _k_mean_obstacles(layer: Any) -> Iterator[str]:
    # A mean moves all scores of a query alike, which softmax alone does not see.
    if soft_cap_of(layer):
        yield f"scores capped at {soft_cap_of(layer):g}"
    if sinks_of(layer) is not None:
        yield "attention sinks"
