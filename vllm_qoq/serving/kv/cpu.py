"""Attention over the quantized KV cache on a CPU: the reference, step by step."""

from __future__ import annotations

from typing import Any

import torch

from vllm_qoq.numerics import reference_attention
from vllm_qoq.serving.kv.backend import (
    KVMetadata,
    QuantizedKVBackend,
    QuantizedKVImpl,
    head_pages,
)


class CPUQuantizedKVImpl(QuantizedKVImpl[KVMetadata]):
    """The attention of one layer; `vllm_qoq.numerics.reference_attention` says what it computes."""

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Quantize the new tokens into their pages; vLLM calls it before `forward`."""
        pages = head_pages(kv_cache)
        reference_attention.update(pages, key, value, slot_mapping, self.bits, self.use_hadamard)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KVMetadata | None,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """`forward` without what only vLLM's interface has."""
        if attn_metadata is None:  # a profiling run has no cache yet
            return output.zero_()
        num_tokens = attn_metadata.num_actual_tokens
        attended = reference_attention.attention(
            query[:num_tokens],
            key[:num_tokens],
            value[:num_tokens],
            head_pages(kv_cache),
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.query_start_loc,
            scale=self.scale,
            bits=self.bits,
            sliding_window=self.sliding_window,
            use_hadamard=self.use_hadamard,
        )
        output[:num_tokens] = attended.view(output[:num_tokens].shape)
        return output


class CPUKV4Backend(QuantizedKVBackend):
    """4 bits."""

    bits = 4

    @staticmethod
    def get_impl_cls() -> type[Any]:
        """The implementation, whatever the bits."""
        return CPUQuantizedKVImpl


class CPUKV8Backend(CPUKV4Backend):
    """8 bits."""

    bits = 8
