"""Attention over the quantized KV cache on a CPU, which computes the reference."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_qoq.numerics import reference_attention
from vllm_qoq.numerics.kv_layout import QuantizedBits
from vllm_qoq.serving.kv.backend import (
    KVMetadata,
    QuantizedKVBackend,
    QuantizedKVImpl,
    head_pages,
)
from vllm_qoq.serving.kv.k_mean import mean_of


class CPUQuantizedKVImpl(QuantizedKVImpl[KVMetadata]):
    """The attention of one layer on a CPU, by `vllm_qoq.numerics.reference_attention`."""

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Quantize the new tokens into their pages; vLLM calls it before `forward`."""
        reference_attention.update(
            head_pages(kv_cache),
            key,
            value,
            slot_mapping,
            self.bits,
            self.use_hadamard,
            k_mean=mean_of(layer),
        )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KVMetadata | None,
        output: torch.Tensor,
        k_mean: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend as `forward` says."""
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
            most_decode_tokens=attn_metadata.most_decode_tokens,
            sliding_window=self.sliding_window,
            use_hadamard=self.use_hadamard,
            k_mean=k_mean,
            soft_cap=self.soft_cap,
            sinks=self.sinks,
        )
        output[:num_tokens] = attended.view(output[:num_tokens].shape)
        return output


class CPUKV4Backend(QuantizedKVBackend):
    """The backend of a 4-bit KV cache on a CPU."""

    bits: ClassVar[QuantizedBits] = 4

    @staticmethod
    def get_impl_cls() -> type[CPUQuantizedKVImpl]:
        """Give vLLM the implementation, which is one for all bits."""
        return CPUQuantizedKVImpl


class CPUKV8Backend(CPUKV4Backend):
    """The backend of an 8-bit KV cache on a CPU."""

    bits = 8


class CPUK8V4Backend(CPUKV4Backend):
    """The backend of a KV cache with keys of 8 bits and values of 4 on a CPU."""

    bits = "k8v4"
