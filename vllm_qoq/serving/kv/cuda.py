"""Attention over the quantized KV cache on a GPU.

Our kernels write and generate, and FlashAttention computes prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_qoq import ops
from vllm_qoq.numerics.kv_layout import QuantizedBits
from vllm_qoq.ops import kv_ops
from vllm_qoq.serving.kv.backend import (
    KVMetadata,
    KVMetadataBuilder,
    QuantizedKVBackend,
    QuantizedKVImpl,
    head_pages,
)
from vllm_qoq.serving.kv.k_mean import mean_of
from vllm_qoq.serving.kv.prefill import (
    Piece,
    Prefill,
    attend_prefill,
    buffer_rows,
    plan_prefill,
)
from vllm_qoq.serving.kv.scores import sinks_of
from vllm_qoq.serving.speculation import is_draft, most_decode_tokens

# The versions of FlashAttention that take sinks.
VERSIONS_WITH_SINKS = (3, 4)
# FlashAttention 3 of vLLM 0.26 is wrong about windows that are no multiple of this where heads have
# 256 channels: of 300 tokens with a window of 100, all from the 129th on were off.
_WINDOW_TILE = 64

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention


@dataclass
class CUDAKVMetadata(KVMetadata):
    """The metadata of a step in which requests that generate come first.

    num_decodes    how many of those there are
    decode_tokens  how many new tokens they have together
    query_len      the most that one of them has
    prefill        the plan for all others, None without any
    """

    num_decodes: int
    decode_tokens: int
    query_len: int
    prefill: Prefill | None


class CUDAKVMetadataBuilder(KVMetadataBuilder):
    """Makes the metadata; steps that only generate have full CUDA graphs.

    Nothing in such a step depends on the host.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._window: int | None = getattr(kv_cache_spec, "sliding_window", None)
        max_new = vllm_config.scheduler_config.max_num_batched_tokens
        self._rows = buffer_rows(self._window, max_new)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CUDAKVMetadata:
        """Make the metadata of one step, without synchronization with the device."""
        common = common_attn_metadata
        # Of requests that generate, only the device knows the length where vLLM schedules a step
        # before the one that verifies has ended. So all of them are the kernel's.
        decodes, prefills, decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=self.most_decode_tokens
        )
        query_len, prefill = common.max_query_len, None
        if prefills:
            first = common.query_start_loc_cpu[: decodes + 1]
            query_len = int((first[1:] - first[:-1]).max()) if decodes else 0
            starts = common.query_start_loc_cpu[decodes : common.num_reqs + 1] - decode_tokens
            # The bound is exact for prompts, and it is known on the host.
            lengths = common.seq_lens_cpu_upper_bound
            assert lengths is not None, "vLLM did not say how long the prompts are"
            history = lengths[decodes : common.num_reqs] - (starts[1:] - starts[:-1])
            prefill = plan_prefill(
                starts.tolist(), history.tolist(), self._window, self._rows, self.device
            )
        return CUDAKVMetadata(
            **vars(super().build(common_prefix_len, common, fast_build)),
            num_decodes=decodes,
            # vLLM may count those that pad a graph.
            decode_tokens=min(decode_tokens, decodes * query_len),
            query_len=query_len,
            prefill=prefill,
        )


class CUDAQuantizedKVImpl(QuantizedKVImpl[CUDAKVMetadata]):
    """The attention of one layer on a GPU.

    `vllm_qoq.numerics.reference_attention` says what it computes.

    max_new_tokens  the most new tokens of a step
    max_query_len   the most new tokens of a request that generates
    """

    def __init__(
        self, *sizes: Any, max_new_tokens: int, max_query_len: int, **options: Any
    ) -> None:
        super().__init__(*sizes, **options)
        self._max_query_len = max_query_len
        self._buffer_rows = buffer_rows(self.sliding_window, max_new_tokens)
        self._flash_version = _flash_version(self.head_size, self.sinks)

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Quantize the new tokens into their pages; vLLM calls it before `forward`."""
        kv_ops.kv_write(
            key,
            value,
            slot_mapping,
            self.bits,
            self.use_hadamard,
            head_pages(kv_cache),
            mean_of(layer),
        )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CUDAKVMetadata | None,
        output: torch.Tensor,
        k_mean: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend as `forward` says."""
        out = output.view(-1, self.num_heads, self.head_size)
        if attn_metadata is None:
            # A profiling run has no cache yet, but has to see the memory that we take.
            self._buffers(query)
            self._workspace(query)
            return output.zero_()
        pages, decodes = head_pages(kv_cache), attn_metadata.num_decodes
        has_one_each = attn_metadata.query_len == 1
        decode_tokens = decodes if has_one_each else attn_metadata.decode_tokens
        if decodes:
            kv_ops.kv_decode(
                query=query[:decode_tokens],
                pages=pages,
                block_table=attn_metadata.block_table[:decodes],
                seq_lens=attn_metadata.seq_lens[:decodes],
                scale=self.scale,
                bits=self.bits,
                window=self.sliding_window or 0,
                hadamard=self.use_hadamard,
                out=out[:decode_tokens],
                workspace=self._workspace(query),
                soft_cap=self.soft_cap,
                sinks=self.sinks,
                query_len=attn_metadata.query_len,
                query_start=(
                    None if has_one_each else attn_metadata.query_start_loc[: decodes + 1]
                ),
            )
        if attn_metadata.prefill is not None:
            rows = slice(decode_tokens, attn_metadata.num_actual_tokens)
            block_table = attn_metadata.block_table[decodes:]
            attend_prefill(
                query=query[rows],
                key=key[rows],
                value=value[rows],
                out=out[rows],
                plan=attn_metadata.prefill,
                window=self.sliding_window,
                k_mean=k_mean,
                kernels=_Kernels(self, pages, block_table, self._buffers(query)),
            )
        return output

    def _workspace(self, query: torch.Tensor) -> torch.Tensor:
        group = self.num_heads // self.num_kv_heads
        return kv_ops.workspace(query.device, group, self.head_size, self._max_query_len)

    def _buffers(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self._buffer_rows, self.num_kv_heads, self.head_size
        return _shared_buffers(query.device, query.dtype, shape)


def _flash_version(head_size: int, sinks: torch.Tensor | None) -> int | None:
    """Choose the version of FlashAttention for prompts, as vLLM does for its own cache."""
    version: int | None = get_flash_attn_version(head_size=head_size, has_sinks=sinks is not None)
    return version


@cache
def _shared_buffers(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the buffers for keys and values that are read back.

    All layers use the same two, one after the other.
    """
    return torch.empty(shape, dtype=dtype, device=device), torch.empty(
        shape, dtype=dtype, device=device
    )


@dataclass(frozen=True)
class _Kernels:
    """The kernels that `attend_prefill` calls, for one layer and step."""

    impl: CUDAQuantizedKVImpl
    pages: torch.Tensor
    block_table: torch.Tensor
    buffers: tuple[torch.Tensor, torch.Tensor]

    def read(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (buffer[: piece.rows] for buffer in self.buffers)
        kv_ops.kv_dequantize(
            pages=self.pages,
            block_table=self.block_table[piece.requests],
            first_token=piece.first_token,
            row_start=piece.row_start,
            bits=self.impl.bits,
            hadamard=self.impl.use_hadamard,
            key=keys,
            value=values,
        )
        return keys, values

    def flash(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_start: torch.Tensor,
        key_start: torch.Tensor,
        longest_query: int,
        longest_key: int,
        is_causal: bool,
        window: int | None,
        has_sinks: bool,
        out: torch.Tensor | None = None,
    ) -> Any:
        return flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            cu_seqlens_q=query_start,
            cu_seqlens_k=key_start,
            max_seqlen_q=longest_query,
            max_seqlen_k=longest_key,
            softmax_scale=self.impl.scale,
            causal=is_causal,
            window_size=[-1, -1] if window is None else [window - 1, 0],
            return_softmax_lse=out is None,
            out=out,
            softcap=self.impl.soft_cap,
            fa_version=self.impl._flash_version,
            s_aux=self.impl.sinks if has_sinks else None,
        )

    def merge(
        self,
        out: torch.Tensor,
        out_lse: torch.Tensor,
        a: torch.Tensor,
        a_lse: torch.Tensor,
        b: torch.Tensor,
        b_lse: torch.Tensor,
    ) -> None:
        merge_attn_states(out, a, a_lse, b, b_lse, out_lse)


class CUDAKV4Backend(QuantizedKVBackend):
    """The backend of a 4-bit KV cache on a GPU."""

    bits: ClassVar[QuantizedBits] = 4
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]

    @staticmethod
    def get_builder_cls() -> type[KVMetadataBuilder]:
        """Give vLLM the builder that splits a step into generation and prompts."""
        return CUDAKVMetadataBuilder

    @staticmethod
    def get_impl_cls() -> type[CUDAQuantizedKVImpl]:
        """Give vLLM the implementation, which is one for all bits."""
        return CUDAQuantizedKVImpl

    @classmethod
    def impl_options(cls, vllm_config: VllmConfig) -> dict[str, Any]:
        """Tell the implementation how many new tokens a step and a request may have."""
        return {
            "max_new_tokens": vllm_config.scheduler_config.max_num_batched_tokens,
            "max_query_len": most_decode_tokens(vllm_config, is_draft(vllm_config)),
        }

    @classmethod
    def obstacles(cls, layer: Attention, dtype: torch.dtype, query_len: int) -> Iterator[str]:
        """List what the kernels do not serve of a layer that computes in `dtype`."""
        if not ops.has_kernels("cuda"):
            yield f"a machine without its kernels: {ops.missing_kernels()}"
        group = layer.num_heads // layer.num_kv_heads
        if group > kv_ops.MAX_GROUP:
            yield f"{group} query heads for a KV head (at most {kv_ops.MAX_GROUP})"
        is_halved = layer.head_size in kv_ops.HALVED_SIZES and group > kv_ops.TILE_GROUP
        if is_halved and group % 2:
            yield (
                f"{group} query heads of size {layer.head_size} for a KV head (up to "
                f"{kv_ops.TILE_GROUP}, or an even number)"
            )
        if dtype not in cls.supported_dtypes:
            yield f"{dtype} on a GPU (it serves bfloat16 and float16)"
        sinks = sinks_of(layer)
        version = _flash_version(layer.head_size, sinks)
        window = layer.sliding_window or 0
        if version == 3 and layer.head_size == 256 and window % _WINDOW_TILE:
            yield (
                f"a window of {window} tokens and heads of size 256 with FlashAttention 3, which "
                f"is wrong there about windows that are no multiple of {_WINDOW_TILE} (take "
                "another with --attention-config '{\"flash_attn_version\": 2}')"
            )
        if sinks is not None:
            if version not in VERSIONS_WITH_SINKS:
                yield (
                    f"attention sinks with FlashAttention {version}, which computes prompts here "
                    "(versions 3 and 4 have them)"
                )
            if sinks.dtype != dtype:
                yield f"attention sinks in {sinks.dtype} of a model in {dtype}"
        if torch.cuda.is_available():
            yield from kv_ops.lacking_shared_memory(layer.head_size, cls.bits, group, query_len)


class CUDAKV8Backend(CUDAKV4Backend):
    """The backend of an 8-bit KV cache on a GPU."""

    bits = 8


class CUDAK8V4Backend(CUDAKV4Backend):
    """The backend of a KV cache with keys of 8 bits and values of 4 on a GPU."""

    bits = "k8v4"
