"""The kernels that can be measured: each makes calls for N, K and a number of tokens.

A preparation makes copies of one random weight [N, K] in the kernel's own layout, once per layer.
What it returns takes M and gives one call per copy, with one input x [M, K] for all; y is
bfloat16 [M, N]. Scales are random, too: times do not depend on them. Quantizing x is not timed.

A peer that is not installed raises ImportError; one that refuses a shape raises whatever it likes.

vLLM's functions for `attention_kernels` are here, too, because no other file imports kernels of
vLLM.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from vllm_qoq.bench import humming_peer
from vllm_qoq.bench.attention_cases import Decode, Heads
from vllm_qoq.measuring.gpu import Call
from vllm_qoq.numerics import reference_attention
from vllm_qoq.ops import linear_ops, w4a8_layout

Calls = Callable[[int], list[Call]]

# The copies of a weight are more bytes than any L2 holds, but not so many that preparing them takes
# long.
_BYTES = 300e6
_FEWEST_COPIES, _MOST_COPIES = 2, 24
_GROUP_SIZE = 128

# In CUDA graphs, vLLM divides a sequence into at most so many parts for FlashAttention 3 and for
# TurboQuant.
_SPLITS, _TURBOQUANT_SPLITS = 32, 32
# Its Triton attention divides a sequence by 16 where fewer programs would run than these.
_TRITON_GRID, _TRITON_SEGMENTS = 128, 16


def copies(weight_bytes: float) -> int:
    """Count the copies of a weight that the calls go round."""
    return max(_FEWEST_COPIES, min(_MOST_COPIES, math.ceil(_BYTES / weight_bytes)))


def qoq(n: int, k: int, group_size: int, is_nested: bool = False) -> Calls:
    """Prepare our kernel, qoq::w4a8_gemm.

    group_size  0 for a scale per channel
    is_nested   whether the weight has a second plane
    """
    blocks = -(-n // w4a8_layout.BLOCK_N), k // w4a8_layout.BLOCK_K
    sizes = [w4a8_layout.block_bytes(group_size)]
    if is_nested:
        sizes.append(w4a8_layout.block_bytes(0))
    weights = [
        [torch.randint(0, 256, (*blocks, size), dtype=torch.uint8, device="cuda") for size in sizes]
        for _ in range(copies(math.prod(blocks) * sum(sizes)))
    ]
    scale, zero = _scale(n), None if group_size else _scale(n)

    def calls(m: int) -> list[Call]:
        x = _int8(m, k)
        tokens = (x, _scale(m), x.sum(1, dtype=torch.int32))
        rest = (scale, zero, None, None, None, torch.bfloat16, linear_ops.workspace(x.device))
        return [
            partial(torch.ops.qoq.w4a8_gemm, *tokens, weight, *rest, *residual)
            for weight, *residual in weights
        ]

    return calls


def cublas_bf16(n: int, k: int) -> Calls:
    """Prepare cuBLAS in bfloat16, which an unquantized layer runs."""
    weights = [_bf16(n, k) for _ in range(copies(2 * n * k))]

    def calls(m: int) -> list[Call]:
        x = _bf16(m, k)
        return [partial(torch.nn.functional.linear, x, weight) for weight in weights]

    return calls


def cutlass_w8a8(n: int, k: int, random: Callable[[int, int], torch.Tensor]) -> Calls:
    """Prepare vLLM's CUTLASS with a scale per channel and token; `random` makes int8 or fp8."""
    from vllm import _custom_ops as vllm_ops

    weights = [random(n, k).t() for _ in range(copies(n * k))]
    scale = _scale(n, 1)

    def calls(m: int) -> list[Call]:
        x, x_scale = random(m, k), _scale(m, 1)
        rest = (x_scale, scale, torch.bfloat16)
        return [partial(vllm_ops.cutlass_scaled_mm, x, weight, *rest) for weight in weights]

    return calls


def marlin(n: int, k: int, has_int8_inputs: bool) -> Calls:
    """Prepare vLLM's Marlin, symmetric int4 in groups of 128, inputs bf16 or int8."""
    from vllm import _custom_ops as vllm_ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    weights = _int4(k // 16, 2 * n, copies(n * k / 2))
    scale = _scale(k // _GROUP_SIZE, n).to(torch.bfloat16)
    if has_int8_inputs:
        scale, _ = marlin_utils.marlin_act_int8_process_scales(scale)
    fixed: dict[str, Any] = {
        **dict.fromkeys(("c", "b_bias", "global_scale", "b_zeros")),
        "b_scales": scale,
        "workspace": marlin_utils.marlin_make_workspace_new(scale.device),
        "b_q_type": scalar_types.uint4b8,
        "use_fp32_reduce": True,
    }
    # Only vLLM with act-order takes these two.
    for name in {"g_idx", "perm"} & set(inspect.signature(vllm_ops.marlin_gemm).parameters):
        fixed[name] = torch.empty(0, dtype=torch.int32, device="cuda")

    def calls(m: int) -> list[Call]:
        x, x_scale = (_int8(m, k), _scale(m, 1)) if has_int8_inputs else (_bf16(m, k), None)
        case = {**fixed, "a": x, "a_scales": x_scale, "size_m": m, "size_n": n, "size_k": k}
        return [partial(vllm_ops.marlin_gemm, b_q_weight=weight, **case) for weight in weights]

    return calls


def machete_w4a16(n: int, k: int) -> Calls:
    """Prepare vLLM's Machete, symmetric int4 in groups of 128, inputs bf16."""
    from vllm import _custom_ops as vllm_ops
    from vllm.scalar_type import scalar_types

    kind, bf16 = scalar_types.uint4b8, torch.bfloat16
    # The weights are [K / 8, N] with K contiguous.
    stored = [weight.t() for weight in _int4(n, k // 8, copies(n * k / 2))]
    weights = [vllm_ops.machete_prepack_B(weight, bf16, kind, bf16) for weight in stored]
    scale = _scale(k // _GROUP_SIZE, n).to(bf16)

    def calls(m: int) -> list[Call]:
        rest = {"b_type": kind, "b_group_scales": scale, "b_group_size": _GROUP_SIZE}
        call = partial(vllm_ops.machete_mm, _bf16(m, k), out_type=bf16, **rest)
        return [partial(call, b_q=weight) for weight in weights]

    return calls


def cutlass_w4a8_fp8(n: int, k: int) -> Calls:
    """Prepare vLLM's CUTLASS, int4 with fp8 scales in groups of 128 and per channel, inputs fp8."""
    from vllm import _custom_ops as vllm_ops

    # The weights are [K / 8, N] with K contiguous.
    stored = [weight.t() for weight in _int4(n, k // 8, copies(n * k / 2))]
    weights = [vllm_ops.cutlass_encode_and_reorder_int4b(weight) for weight in stored]
    group_scale = _scale(k // _GROUP_SIZE, n).to(torch.float8_e4m3fn)
    fixed: dict[str, Any] = {
        "b_group_scales": vllm_ops.cutlass_pack_scale_fp8(group_scale),
        "b_group_size": _GROUP_SIZE,
        "b_channel_scales": _scale(n, 1),
        "out_type": torch.bfloat16,
    }

    def calls(m: int) -> list[Call]:
        case = {**fixed, "a": _fp8(m, k), "a_token_scales": _scale(m, 1)}
        return [partial(vllm_ops.cutlass_w4a8_mm, b_q=weight, **case) for weight in weights]

    return calls


def humming(n: int, k: int, group_size: int) -> Calls:
    """Prepare humming, symmetric int4 in groups of 128 or per channel (0), inputs int8."""
    layers = [humming_peer.layer(_bf16(n, k), group_size) for _ in range(copies(n * k / 2))]

    def calls(m: int) -> list[Call]:
        rest = humming_peer.arguments(_bf16(m, k), layers[0])
        return [partial(layer, **rest) for layer in layers]

    return calls


def flash_attention_3() -> Callable[..., Callable[..., object]]:
    """Prepare vLLM's FlashAttention 3 over its cache, with what vLLM computes once a step.

    What it returns takes the query [R * new tokens, Hq, D], key and value [blocks, tokens, H, D],
    int32 lengths [R], the output and the new tokens of a sequence, and gives a call that takes
    block_table, int32 [R, blocks of a sequence].
    """
    from vllm.vllm_flash_attn import (
        fa_version_unsupported_reason,
        flash_attn_varlen_func,
        get_scheduler_metadata,
        is_fa_version_supported,
    )

    if not is_fa_version_supported(3):
        raise RuntimeError(fa_version_unsupported_reason(3))

    def attend(
        heads: Heads,
        case: Decode,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: torch.Tensor,
        out: torch.Tensor,
        new_tokens: int = 1,
    ) -> Callable[..., object]:
        starts = torch.arange(case.batch + 1, dtype=torch.int32, device=query.device) * new_tokens
        limits = {"max_seqlen_q": new_tokens, "max_seqlen_k": case.context}
        splits = _SPLITS if new_tokens == 1 else 0  # With 0, FlashAttention chooses.
        shared = {"cu_seqlens_q": starts, "causal": True, "num_splits": splits}
        metadata = get_scheduler_metadata(
            batch_size=case.batch,
            num_heads_q=heads.query,
            num_heads_kv=heads.kv,
            headdim=heads.size,
            cache_seqlens=lengths,
            qkv_dtype=query.dtype,
            page_size=heads.block_tokens,
            **limits,
            **shared,
        )
        scales: dict[str, torch.Tensor] = {}
        if query.dtype != torch.bfloat16:
            one = torch.ones((), device=query.device).expand(case.batch, heads.kv)
            scales = dict.fromkeys(("q_descale", "k_descale", "v_descale"), one)
        return partial(
            flash_attn_varlen_func,
            q=query,
            k=key,
            v=value,
            out=out,
            seqused_k=lengths,
            softmax_scale=heads.size**-0.5,
            scheduler_metadata=metadata,
            fa_version=3,
            **limits,
            **shared,
            **scales,
        )

    return attend


def flash_attention_3_of_prompt(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor
) -> Callable[[], object]:
    """Make a call of FlashAttention 3 for one prompt [T, H, D] that attends to itself alone."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    tokens = len(query)
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=query.device)
    return partial(
        flash_attn_varlen_func,
        q=query,
        k=key,
        v=value,
        out=out,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=tokens,
        max_seqlen_k=tokens,
        softmax_scale=query.shape[-1] ** -0.5,
        causal=True,
        fa_version=3,
    )


def reshape_and_cache() -> Callable[..., object]:
    """Import vLLM's write of K and V for FlashAttention."""
    from vllm import _custom_ops as vllm_ops

    return vllm_ops.reshape_and_cache_flash


def int4_attention(heads: Heads) -> Callable[..., Callable[..., object]]:
    """Prepare vLLM's Triton attention over kv_cache_dtype int4_per_token_head, for decode.

    What it returns takes the query [R, Hq, D], the bytes of K and V [blocks, tokens, H, D / 2 + 4],
    their scales [blocks, tokens, H], int32 lengths [R] and the output, and gives a call that takes
    block_table.
    """
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    # Like vLLM's backend, few sequences are divided into segments, whose results are here.
    divided = max(1, _TRITON_GRID // heads.kv)
    segments = (divided, heads.query, _TRITON_SEGMENTS)
    padded = 1 << (heads.size - 1).bit_length()
    segment_output = torch.empty((*segments, padded), dtype=torch.float32, device="cuda")
    largest, sums = torch.empty((2, *segments), dtype=torch.float32, device="cuda")

    def attend(
        case: Decode,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        k_scale: torch.Tensor,
        v_scale: torch.Tensor,
        lengths: torch.Tensor,
        out: torch.Tensor,
    ) -> Callable[..., object]:
        return partial(
            unified_attention,
            q=query,
            k=key,
            v=value,
            out=out,
            cu_seqlens_q=torch.arange(case.batch + 1, dtype=torch.int32, device=query.device),
            max_seqlen_q=1,
            seqused_k=lengths,
            max_seqlen_k=case.context,
            softmax_scale=heads.size**-0.5,
            causal=True,
            window_size=(-1, -1),
            softcap=0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            seq_threshold_3D=divided,
            num_par_softmax_segments=_TRITON_SEGMENTS,
            softmax_segm_output=segment_output,
            softmax_segm_max=largest,
            softmax_segm_expsum=sums,
            kv_quant_mode=KVQuantMode.INT4_PER_TOKEN_HEAD,
            k_scale_cache=k_scale,
            v_scale_cache=v_scale,
        )

    return attend


def int4_reshape_and_cache() -> Callable[..., object]:
    """Import vLLM's write of K and V for `int4_attention`."""
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import (
        triton_reshape_and_cache_flash_per_token_head_quant,
    )
    from vllm.v1.kv_cache_interface import KVQuantMode

    mode = KVQuantMode.INT4_PER_TOKEN_HEAD
    return partial(triton_reshape_and_cache_flash_per_token_head_quant, kv_quant_mode=mode)


def turboquant_attention(heads: Heads) -> Callable[..., Callable[..., object]]:
    """Prepare vLLM's Triton attention over kv_cache_dtype turboquant_4bit_nc, for decode.

    What it returns takes the query [R, Hq, D], the cache, uint8 [blocks, tokens, H, D + 6], int32
    lengths [R] and the output, and gives a call that takes block_table.
    """
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

    config, centroids, shared = _turboquant(heads)

    def attend(
        query: torch.Tensor, cache: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor
    ) -> Callable[..., object]:
        # Like vLLM's backend, this has the divisions' results and the logarithms of their sums.
        divided = (*query.shape[:2], _TURBOQUANT_SPLITS, heads.size + 1)
        return partial(
            triton_turboquant_decode_attention,
            query=query,
            kv_cache=cache,
            seq_lens=lengths,
            Pi=shared["PiT"],  # The matrix is symmetric.
            centroids=centroids,
            scale=heads.size**-0.5,
            norm_correction=config.norm_correction,
            mid_o_buf=torch.empty(divided, dtype=torch.float32, device=query.device),
            output_buf=out,
            lse_buf=torch.empty(query.shape[:2], dtype=torch.float32, device=query.device),
            max_num_kv_splits=_TURBOQUANT_SPLITS,
            **shared,
        )

    return attend


def turboquant_store(heads: Heads) -> Callable[..., object]:
    """Prepare vLLM's write of K and V for `turboquant_attention`."""
    from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

    _, centroids, shared = _turboquant(heads)
    midpoints = (centroids[:-1] + centroids[1:]) / 2
    return partial(triton_turboquant_store, midpoints=midpoints, **shared)


def _turboquant(heads: Heads) -> tuple[Any, torch.Tensor, dict[str, Any]]:
    """TurboQuant's config, K's sorted centroids float32 [16], and what both functions take."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    config = TurboQuantConfig.from_cache_dtype("turboquant_4bit_nc", heads.size)
    centroids, _ = get_centroids(heads.size, config.centroid_bits).to(device="cuda").sort()
    shared = {
        "PiT": reference_attention.hadamard(torch.eye(heads.size, device="cuda")),
        "mse_bits": config.key_mse_bits,
        "key_packed_size": config.key_packed_size,
        "value_quant_bits": config.effective_value_quant_bits,
        "key_fp8": config.key_fp8,
    }
    return config, centroids, shared


def _scale(*shape: int) -> torch.Tensor:
    return torch.rand(shape, device="cuda") * 0.01 + 0.001


def _bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def _fp8(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(torch.float8_e4m3fn)


def _int8(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")


def _int4(rows: int, columns: int, count: int) -> list[torch.Tensor]:
    """Make `count` weights int32 [rows, columns], with eight codes in a word."""
    limits, shape = (-(2**31), 2**31 - 1), (rows, columns)
    return [torch.randint(*limits, shape, dtype=torch.int32, device="cuda") for _ in range(count)]


# The order is that of cases.KERNELS.
PREPARE: dict[str, Callable[[int, int], Calls]] = {
    "qoq-g128": partial(qoq, group_size=128),
    "qoq-g64": partial(qoq, group_size=64),
    "qoq-g32": partial(qoq, group_size=32),
    "qoq-channel": partial(qoq, group_size=0),
    "qoq-nested": partial(qoq, group_size=128, is_nested=True),
    "cublas-bf16": cublas_bf16,
    "cutlass-int8": partial(cutlass_w8a8, random=_int8),
    "cutlass-fp8": partial(cutlass_w8a8, random=_fp8),
    "marlin-w4a16": partial(marlin, has_int8_inputs=False),
    "marlin-w4a8-int8": partial(marlin, has_int8_inputs=True),
    "machete-w4a16": machete_w4a16,
    "cutlass-w4a8-fp8": cutlass_w4a8_fp8,
    "humming-g128": partial(humming, group_size=_GROUP_SIZE),
    "humming-channel": partial(humming, group_size=0),
}
# What is compiled before anything is measured: each makes work for threads from shapes (N, K) and
# numbers of tokens.
COMPILE: dict[
    str, Callable[[Sequence[tuple[int, int]], Sequence[int]], list[Callable[[], object]]]
] = {
    "humming-g128": partial(humming_peer.compilations, _GROUP_SIZE),
    "humming-channel": partial(humming_peer.compilations, 0),
}
