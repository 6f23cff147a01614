"""The size of the quantized KV cache's pages, in vLLM's words.

vLLM 0.32 and newer ask the backend (`packed`). Older ones ask the layer, which answers with one of
the classes below (`spec_of_layer`); vLLM finds the manager of a subclass through its bases, and
pickles it to the engine core, where this module is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec

from vllm_qoq.numerics.kv_layout import QuantizedBits, slot_bytes


def packed(spec: AttentionSpec, bits: QuantizedBits) -> AttentionSpec:
    """Give `spec` the quantized page (vLLM 0.32+); twice does no harm, as vLLM may ask twice."""
    size = slot_bytes(spec.head_size, bits)
    return replace(spec, dtype=torch.uint8, state_content_bytes=size)


@dataclass(frozen=True, kw_only=True)
class PackedFullAttentionSpec(FullAttentionSpec):
    """The spec of full attention, with `packed_slot_bytes` a token and head (before 0.32)."""

    packed_slot_bytes: int

    @property
    def real_page_size_bytes(self) -> int:
        """Count the bytes of one block of one layer."""
        return self.block_size * self.num_kv_heads * self.packed_slot_bytes

    @classmethod
    def merge(cls, specs: Sequence[Any]) -> PackedFullAttentionSpec:
        """Merge the specs of a group of layers, which must be equal but for the window's size."""
        windows = {spec.sliding_window for spec in specs if spec.sliding_window is not None}
        merged = replace(specs[0], sliding_window=cls.merge_window_sizes(windows))
        assert all(replace(s, sliding_window=merged.sliding_window) == merged for s in specs), (
            "layers of one KV cache group have different pages"
        )
        return merged


@dataclass(frozen=True, kw_only=True)
class PackedSlidingWindowSpec(SlidingWindowSpec):
    """The spec of layers with a sliding window, whose older blocks vLLM frees (before 0.32)."""

    packed_slot_bytes: int

    @property
    def real_page_size_bytes(self) -> int:
        """Count the bytes of one block of one layer."""
        return self.block_size * self.num_kv_heads * self.packed_slot_bytes


def spec_of_layer(layer: Attention, bits: QuantizedBits, vllm_config: VllmConfig) -> AttentionSpec:
    """Answer `layer.get_kv_cache_spec(vllm_config)`, which vLLM before 0.32 calls."""
    common = {
        "block_size": vllm_config.cache_config.block_size,
        "num_kv_heads": layer.num_kv_heads,
        "head_size": layer.head_size,
        "dtype": torch.uint8,
        "packed_slot_bytes": slot_bytes(layer.head_size, bits),
    }
    # Without the hybrid manager vLLM turns a SlidingWindowSpec into a plain FullAttentionSpec,
    # which would lose the size of the page.
    is_hybrid_off = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    if layer.sliding_window is None or is_hybrid_off:
        return PackedFullAttentionSpec(**common, sliding_window=layer.sliding_window)
    return PackedSlidingWindowSpec(**common, sliding_window=layer.sliding_window)
