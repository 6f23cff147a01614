"""The parts that all attention backends over the quantized KV cache share: page, blocks, metadata.

A device adds the implementation: a subclass for each precision, with `bits` and `get_impl_cls`
(`cpu`, `cuda` beside this module), which `cache` knows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_qoq.numerics.kv_layout import (
    BLOCK_MULTIPLE,
    HEAD_SIZES,
    QuantizedBits,
    slot_bytes,
)
from vllm_qoq.serving.kv.k_mean import mean_of
from vllm_qoq.serving.kv.spec import packed
from vllm_qoq.serving.speculation import DRAFT_PREFIX, most_decode_tokens
from vllm_qoq.serving.vllm_versions import kv_cache_layouts

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.kv_cache_layout import KVCacheLayout

# QServe's blocks have this size, and the kernels prefer it to a smaller one: runs of bytes are
# longer, and block tables have fewer entries.
PREFERRED_BLOCK_SIZE = 64
NAME = "QOQ"


@dataclass
class KVMetadata(AttentionMetadata):
    """The metadata of one step, for R requests with T new tokens in all.

    query_start_loc  int32 [R + 1]             seq_lens      int32 [R], the new tokens included
    block_table      int32 [R, max_blocks]     slot_mapping  int64 [>= T]

    most_decode_tokens  a request with no more new tokens reads them from the pages, too
    """

    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    most_decode_tokens: int


class KVMetadataBuilder(AttentionMetadataBuilder[KVMetadata]):
    """Hands on the metadata that the runner prepared."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        is_draft = any(name.startswith(DRAFT_PREFIX) for name in layer_names)
        self.most_decode_tokens = most_decode_tokens(vllm_config, is_draft)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> KVMetadata:
        """Make the metadata of one step, without synchronization with the device."""
        common = common_attn_metadata
        return KVMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            most_decode_tokens=self.most_decode_tokens,
        )


M = TypeVar("M", bound=KVMetadata)


class QuantizedKVImpl(AttentionImpl[M], Generic[M]):
    """The attention of one layer; a device adds `do_kv_cache_update` and `attend`.

    scale           the factor of the scores
    sliding_window  a token sees itself and the sliding_window - 1 before it; None means all
    use_hadamard    whether K is rotated, and Q to match
    soft_cap        scores become soft_cap * tanh(score / soft_cap); 0 leaves them as they are
    sinks           [Hq], filled when weights are loaded: a score of each head beside its tokens'
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        *,
        sliding_window: int | None,
        bits: QuantizedBits,
        use_hadamard: bool,
        soft_cap: float,
        sinks: torch.Tensor | None,
    ) -> None:
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale = scale
        self.sliding_window = sliding_window
        self.bits, self.use_hadamard = bits, use_hadamard
        self.soft_cap, self.sinks = soft_cap, sinks
        self.kv_cache_dtype = "auto"  # the cache is an ordinary one to vLLM

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: M | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend: query [>= T, Hq, D], key and value [>= T, H, D]; writes T rows of `output`."""
        if output_scale is not None or output_block_scale is not None:
            raise ValueError(
                "the quantized KV cache does not quantize the attention's output; leave "
                "fuse_attn_quant out of --compilation-config"
            )
        k_mean = mean_of(layer)
        return self.attend(query, key, value, kv_cache, attn_metadata, output, k_mean)

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: M | None,
        output: torch.Tensor,
        k_mean: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute `forward`; without metadata it is a profiling run, which has no cache yet.

        k_mean  float32 [H, D], which the keys in the cache lack; None where they lack nothing
        """


class QuantizedKVBackend(AttentionBackend):
    """A backend for attention over pages of `vllm_qoq.numerics.kv_layout`.

    The cache of a layer is uint8 [num_blocks, H, N, slot bytes], of which the last two dimensions
    only say how many bytes a head has: `head_pages` is the view that the page's definition means.
    """

    bits: ClassVar[QuantizedBits]
    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """Name the backend; that of a layer says more (`named`)."""
        return NAME

    @staticmethod
    def get_builder_cls() -> type[KVMetadataBuilder]:
        """Give vLLM the builder of the metadata, which a device may replace."""
        return KVMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """List the head sizes of the page."""
        return list(HEAD_SIZES)

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: AttentionSpec | None = None,
    ) -> list[MultipleOf]:
        """Allow multiples of 16 tokens; vLLM 0.32 also says for which spec it asks."""
        return [MultipleOf(BLOCK_MULTIPLE)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Say what vLLM takes on a GPU without --block-size, if the first layers are ours."""
        return max(default_block_size, PREFERRED_BLOCK_SIZE)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Say that sliding windows are served; the implementation knows the layer's window."""
        return True

    @classmethod
    def impl_options(cls, vllm_config: VllmConfig) -> dict[str, Any]:
        """Make more arguments of the implementation, which depend on the engine."""
        return {}

    @classmethod
    def obstacles(cls, layer: Attention, dtype: torch.dtype, query_len: int) -> Iterator[str]:
        """List what this device does not serve of a layer that computes in `dtype`.

        query_len  the most new tokens of a request that generates
        """
        return iter(())

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Say the size of the page (vLLM 0.32+)."""
        return packed(spec, cls.bits)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Say the orders that the cache's dimensions may have (vLLM 0.32+)."""
        return kv_cache_layouts()

    @classmethod
    def get_kv_cache_shape(
        cls,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """Say the shape of the cache (vLLM before 0.32)."""
        return num_blocks, num_kv_heads, block_size, slot_bytes(head_size, cls.bits)


def named(backend: type[QuantizedKVBackend], name: str) -> type[QuantizedKVBackend]:
    """Make a subclass of `backend` with a name of its own; vLLM groups layers as by `backend`.

    NIXL's handshake compares names, and nothing else that tells our caches apart.
    """
    members = {
        "get_name": staticmethod(lambda: name),
        "__module__": backend.__module__,
        "__qualname__": backend.__qualname__,
    }
    return type(backend.__name__, (backend,), members)


def head_pages(kv_cache: torch.Tensor) -> torch.Tensor:
    """View uint8 [num_blocks, H, N, slot bytes] as uint8 [num_blocks, H, head_bytes].

    Blocks and heads may be further apart than they are large.
    """
    return kv_cache.view(*kv_cache.shape[:2], -1)
