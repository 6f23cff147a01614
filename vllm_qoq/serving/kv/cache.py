"""The switch that turns the quantized KV cache on, layer by layer.

vLLM asks the quantization config about each attention layer at the end of the layer's
constructor. Layers that are to be quantized get another backend and implementation there, on the
instance: `--kv-cache-dtype` stays `auto` and everything that handles whole pages (prefix caching,
preemption, KV connectors) sees an ordinary cache. vLLM asks again once the weights are loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_qoq.checkpoint.kv_config import UNQUANTIZED, Bits, KVCache, described
from vllm_qoq.errors import UserError
from vllm_qoq.numerics.kv_layout import QuantizedBits
from vllm_qoq.serving.kv import refusals as kv_refusals
from vllm_qoq.serving.kv.backend import NAME, QuantizedKVBackend, named
from vllm_qoq.serving.kv.cpu import CPUK8V4Backend, CPUKV4Backend, CPUKV8Backend
from vllm_qoq.serving.kv.k_mean import REFUSING, add_mean, finish_mean, loading_rules
from vllm_qoq.serving.kv.key_bias import KeyBiasWatch
from vllm_qoq.serving.kv.scores import sinks_of, soft_cap_of
from vllm_qoq.serving.kv.spec import spec_of_layer
from vllm_qoq.serving.options import NAMESPACE, Options
from vllm_qoq.serving.speculation import is_draft, most_decode_tokens
from vllm_qoq.serving.vllm_versions import set_kv_cache_spec
from vllm_qoq.version import __version__

logger = init_logger("vllm." + __name__)

DEVICES = ("cpu", "cuda")


def backends_of(device_type: str) -> dict[QuantizedBits, type[QuantizedKVBackend]]:
    """Map bits to the backend of a device; a GPU's imports what vLLM has only there."""
    backends: tuple[type[QuantizedKVBackend], ...] = (CPUKV4Backend, CPUKV8Backend, CPUK8V4Backend)
    if device_type != "cpu":
        from vllm_qoq.serving.kv.cuda import CUDAK8V4Backend, CUDAKV4Backend, CUDAKV8Backend

        backends = (CUDAKV4Backend, CUDAKV8Backend, CUDAK8V4Backend)
    return {backend.bits: backend for backend in backends}


def kv_cache_in_force(kv_cache: KVCache | None, options: Options) -> KVCache:
    """Decide the KV cache: the checkpoint's, unless `kv_bits` replaces the bits of every layer.

    Raises UserError where `kv_hadamard` asks for a rotation of keys that nothing quantizes.
    """
    kv_cache = kv_cache or KVCache(bits=UNQUANTIZED)
    if options.kv_bits is not None:
        kv_cache = kv_cache.model_copy(update={"bits": options.kv_bits, "layers": ()})
    if options.kv_hadamard is None:
        return kv_cache
    if options.kv_hadamard and not kv_cache.is_quantized():
        raise UserError(
            f"--additional-config: {NAMESPACE}.kv_hadamard: rotates the keys of a quantized KV "
            "cache, and this one has 16 bits; add kv_bits, or leave kv_hadamard out"
        )
    return kv_cache.model_copy(update={"hadamard": options.kv_hadamard})


def check_kv_cache(kv_cache: KVCache, vllm_config: VllmConfig) -> None:
    """Raise UserError where the engine or its device does not serve a cache in these bits."""
    if not kv_cache.is_quantized():
        return
    kv_refusals.check_engine(vllm_config)
    device = vllm_config.device_config.device_type
    if device not in DEVICES:
        raise UserError(
            f"the quantized KV cache runs on {' and '.join(DEVICES)}, not on {device}; "
            f"{kv_refusals.REMEDY}"
        )
    if device == "cuda":
        kv_refusals.check_query_len(vllm_config)


class QuantizedKVCache:
    """The KV cache of one engine in one process: which layers have it, and in which bits."""

    def __init__(
        self,
        kv_cache: KVCache | None,
        vllm_config: VllmConfig,
        map_name: Callable[[str], str],
    ) -> None:
        in_force = kv_cache_in_force(kv_cache, Options.of(vllm_config))
        self.kv_cache = in_force.rename(map_name)
        self._vllm_config = vllm_config
        self._layers: dict[str, Bits] = {}
        check_kv_cache(self.kv_cache, vllm_config)
        # A model and its draft share the table of layers, and the draft is built later.
        self._of_others = frozenset(vllm_config.compilation_config.static_forward_context)
        self._is_checked = False
        self._key_biases = KeyBiasWatch()
        if not self.kv_cache.is_quantized():
            return
        name = backend_name(self.kv_cache)
        of_device = backends_of(vllm_config.device_config.device_type)
        self._backends = {bits: named(backend, name) for bits, backend in of_device.items()}
        logger.info("Quantized KV cache: %s", self.kv_cache.to_json())

    def attach(self, layer: nn.Module, prefix: str) -> None:
        """Give `layer` the backend of its bits, at the first call.

        vLLM calls a second time when weights are loaded, which is when biases and means of K are
        looked at.
        """
        bits = self.kv_cache.bits_of(prefix)
        if prefix in self._layers:
            self._key_biases.warn(self._layers, self.kv_cache.hadamard)
            finish_mean(layer, prefix)
            return
        self._layers[prefix] = bits
        if bits == UNQUANTIZED:
            return
        backend, dtype = self._backends[bits], self._vllm_config.model_config.dtype
        query_len = most_decode_tokens(self._vllm_config, is_draft(self._vllm_config))
        of_device = partial(backend.obstacles, dtype=dtype, query_len=query_len)
        kv_refusals.check_layer(layer, prefix, self.kv_cache, of_device)
        if layer.sliding_window is not None:
            kv_refusals.check_mixed_windows(self.kv_cache, self._vllm_config)
        self._swap(layer, bits)
        if self.kv_cache.k_mean:
            add_mean(layer, prefix)

    def watch(self, layer: nn.Module, prefix: str, owner: nn.Module | None) -> None:
        """Look at `layer` of `owner` when its weights are loaded, if it makes keys."""
        # Who measured the means has looked at the biases.
        if self.kv_cache.is_quantized() and not self.kv_cache.k_mean:
            self._key_biases.add(layer, prefix, owner)

    def loading_rules(self) -> dict[re.Pattern[str], Any]:
        """Say how the checkpoint's means of K are renamed for vLLM's loader; call as below."""
        if not self.kv_cache.k_mean:
            return REFUSING
        quantized = [name for name, bits in self._layers.items() if bits != UNQUANTIZED]
        return loading_rules(quantized, self._layers.keys() - quantized)

    def check_layers(self) -> None:
        """Refuse layers that were never asked about, and rules without a layer.

        Call when all layers exist. A model that does not hand its quantization config to an
        attention layer would silently keep that one unquantized. Later calls are for other models
        that are built with the same config, such as a draft head, and for weights that are loaded
        anew.
        """
        if not self.kv_cache.is_quantized() or self._is_checked:
            return
        self._is_checked = True
        layers: dict[str, Any] = self._vllm_config.compilation_config.static_forward_context
        for name, layer in layers.items():
            is_decoder = isinstance(layer, Attention) and layer.attn_type == AttentionType.DECODER
            is_known = name in self._layers or name in self._of_others
            if (is_decoder or isinstance(layer, MLAAttention)) and not is_known:
                raise UserError(
                    f"{name}: this model does not offer its attention to quantization; "
                    f"{kv_refusals.REMEDY}"
                )
        is_pipeline = self._vllm_config.parallel_config.pipeline_parallel_size > 1
        unmatched = [] if is_pipeline else self.kv_cache.unmatched(self._layers)
        if unmatched:
            raise UserError(
                f"the KV cache rule {unmatched[0]!r} matches no attention layer of this model; "
                f"names look like {next(iter(self._layers))!r}"
            )

    def _swap(self, layer: Any, bits: QuantizedBits) -> None:
        backend = self._backends[bits]
        layer.attn_backend = backend
        layer.impl = backend.get_impl_cls()(
            layer.num_heads,
            layer.head_size,
            float(layer.impl.scale),
            layer.num_kv_heads,
            sliding_window=layer.sliding_window,
            bits=bits,
            use_hadamard=self.kv_cache.hadamard,
            soft_cap=soft_cap_of(layer),
            sinks=sinks_of(layer),
            **backend.impl_options(self._vllm_config),
        )
        layer.backend = AttentionBackendEnum.CUSTOM  # vLLM's word for a plugin's
        set_kv_cache_spec(layer, partial(spec_of_layer, layer, bits))


def backend_name(kv_cache: KVCache) -> str:
    """Name all that two engines have to agree on to read each other's pages.

    KV connectors compare the name of the first layer's backend.
    """
    return f"{NAME} {__version__} {json.dumps(kv_cache.to_json(), sort_keys=True)}"


def check_without_sets(kv_cache: KVCache | None, vllm_config: VllmConfig) -> None:
    """Raise UserError unless a model without sets is asked for its KV cache and nothing else."""
    options = Options.of(vllm_config)
    if kv_cache is None and options.kv_bits is None:
        raise UserError(
            "this model has no quantized weights, so quantization 'qoq' can only quantize its KV "
            'cache: --additional-config \'{"qoq": {"kv_bits": 4}}\', or leave out --quantization'
        )
    for key in ("force_set", "routing", "force_load", "trace"):
        value = getattr(options, key)
        # An engine without sets is always calm, so that may be said.
        if value is not None and (key, value) != ("force_load", "calm"):
            raise UserError(
                f"--additional-config: {NAMESPACE}.{key}: this model has no sets to choose from"
            )


def describe(kv_cache: KVCache | None, vllm_config: VllmConfig) -> str:
    """Say for people what keys and values are stored in: `4 bits`, `k8v4`, or vLLM's own word."""
    in_force = kv_cache_in_force(kv_cache, Options.of(vllm_config))
    if in_force.bits == UNQUANTIZED:
        return str(vllm_config.cache_config.cache_dtype)
    keys = f"{'rotated ' if in_force.hadamard else ''}K{' without its mean' * in_force.k_mean}"
    return described(in_force.bits) + (f" of {keys}" if keys != "K" else "")
