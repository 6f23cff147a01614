"""The CUDA ops over the quantized KV cache: their schemas, fakes and Python wrappers.

`vllm_qoq.numerics.kv_layout` defines the page, and `reference_attention` beside it what the ops
compute. The CPU calls those two directly. Arguments that the ops share are

pages        uint8 [num_blocks, H, head_bytes]: a block of N tokens, N a multiple of 16
bits         4, 8 or "k8v4", keys of 8 bits and values of 4, which the ops take as two numbers;
             the head size D is 64, 96, 128 or 256, and up to 16 query heads share a KV head;
             more than 8 of 96 or 256 channels are an even number
hadamard     rotate K (and the query to match) by the Sylvester matrix / sqrt(D), D a power of two
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

from vllm_qoq.numerics.kv_layout import QuantizedBits, slot_bytes, widths
from vllm_qoq.ops.library import define

# csrc/kv/ has these numbers, too: what the kernels serve, and the sizes of their workspace. The
# head sizes are those of the page (`kv_layout`).
MAX_GROUP = 16  # query heads of a KV head
# Where so many are too many for a tile of the kernel, two halves of them read the same pages.
HALVED_SIZES = (96, 256)
TILE_GROUP = 8
MAX_QUERY_LEN = 8  # new tokens of a request
WORKSPACE_COUNTERS = 1024
WORKSPACE_BLOCKS_OF_PROCESSOR = 2  # blocks of threads that a multiprocessor holds at most
WORKSPACE_PADDING = 4  # integers of a partial sum beside its channels
DECODE_FEWEST_WARPS = 4  # of a block, where shared memory has no room for more
DECODE_TILE = 32  # tokens


def decode_columns(head_size: int, group: int, query_len: int = 1) -> int:
    """Count the columns of the products of `kv_decode`: query heads, for each of the new tokens.

    Where there are more than tiles have room for, they are divided into 2, 4, 8 or 16 parts.
    """
    most = TILE_GROUP if head_size in HALVED_SIZES else MAX_GROUP
    parts = 1
    while -(-group * query_len // parts) > most:
        parts *= 2
    return -(-group * query_len // parts)


@cache
def workspace(device: torch.device, group: int, head_size: int, query_len: int = 1) -> torch.Tensor:
    """Make the buffer in which the blocks of a `kv_decode` add up what they share: int32 zeros.

    Every launch leaves its counters zero, so all layers use the same one; two launches that run at
    the same time in two streams need one each. The first step makes the buffer, so it is outside of
    the memory of weights and cache, which vLLM drops when it sleeps.

    group      the number of query heads that share a KV head
    query_len  the most new tokens of a request; the buffer is also for launches with fewer
    """
    if not 1 <= group <= MAX_GROUP:
        raise ValueError(f"{group} query heads share a KV head; the kernels serve 1 to {MAX_GROUP}")
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    blocks = processors * WORKSPACE_BLOCKS_OF_PROCESSOR
    lengths = range(1, query_len + 1)
    columns = max(decode_columns(head_size, group, length) for length in lengths)
    partials = 2 * blocks * columns * (head_size + WORKSPACE_PADDING)
    return torch.zeros(WORKSPACE_COUNTERS + partials, dtype=torch.int32, device=device)


def decode_shared_bytes(head_size: int, bits: QuantizedBits, group: int, query_len: int = 1) -> int:
    """Compute the least shared memory of a block of `kv_decode`: rings, and sums of the warps.

    query_len  the new tokens of a request
    """
    stages = 4 if head_size == 64 else 2
    columns = decode_columns(head_size, group, query_len)
    ring = stages * (DECODE_TILE * slot_bytes(head_size, bits) + 8)
    sums = columns * (head_size + WORKSPACE_PADDING) * 4
    of_warp, of_block = (44, 64) if query_len == 1 else (52, 80)
    return 128 + DECODE_FEWEST_WARPS * (ring + sums + of_warp) + of_block


def lacking_shared_memory(
    head_size: int, bits: QuantizedBits, group: int, query_len: int = 1
) -> Iterator[str]:
    """Say for which heads the blocks of this GPU have too little shared memory, if they have.

    query_len  the most new tokens of a request
    """
    properties = torch.cuda.get_device_properties()
    there = int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]
    lengths = range(1, query_len + 1)
    needed = max(decode_shared_bytes(head_size, bits, group, length) for length in lengths)
    if needed > there:
        tokens = f" and {query_len} new tokens a request" if query_len > 1 else ""
        numbers = f"{bits} bits" if isinstance(bits, int) else bits
        yield (
            f"{numbers}, head size {head_size}, {group} query heads for a KV head{tokens}, which "
            f"need {needed} bytes of shared memory, on a GPU whose blocks have {there} (fewer bits "
            "need less)"
        )


def kv_write(
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    bits: QuantizedBits,
    hadamard: bool,
    pages: torch.Tensor,
    k_mean: torch.Tensor | None = None,
) -> None:
    """Quantize new tokens into their pages, as `reference_attention.update` does.

    key, value  bfloat16 or float16 [>= T, H, D]   K after RoPE
    slots       int64 [T]   block * N + position in it; what is not in `pages` is skipped
    k_mean      float32 [H, D]   is subtracted from every key before it is rotated
    """
    torch.ops.qoq.kv_write(key, value, slots, *widths(bits), hadamard, pages, k_mean)


def kv_decode(
    query: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    bits: QuantizedBits,
    window: int,
    hadamard: bool,
    out: torch.Tensor,
    workspace: torch.Tensor,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    query_len: int = 1,
    query_start: torch.Tensor | None = None,
) -> None:
    """Compute the attention of new tokens, one a request or a few, which are in the pages already.

    The i-th of n new tokens of a request sees its first seq_lens - n + i + 1 tokens, and is zero if
    there are none.

    query, out   bfloat16 or float16 [R, Hq, D], or, with `query_start`, [T, Hq, D]
    block_table  int32 [R, max_blocks]     seq_lens  int32 [R], on the device; 0 gives zeros
    window       how many of the last tokens are seen; 0 stands for all
    workspace    the buffer that the function `workspace` makes
    soft_cap     scores become soft_cap * tanh(score / soft_cap); 0 leaves them as they are
    sinks        [Hq] of the query's type: a score of each query head beside those of its tokens
    query_len    the most new tokens of a request, 1 to 8
    query_start  int32 [R + 1], on the device: request r has the rows from [r] to [r + 1], at most
                 query_len of them. Rows of no request are left as they are. It is given where
                 query_len is more than 1

    The same inputs give the same bits on the same GPU. Nothing of the launch depends on
    `seq_lens` and `query_start`, so a CUDA graph may be replayed with others.
    """
    torch.ops.qoq.kv_decode(
        query,
        pages,
        block_table,
        seq_lens,
        scale,
        *widths(bits),
        window,
        hadamard,
        out,
        workspace,
        soft_cap,
        sinks,
        query_len,
        query_start,
    )


def kv_dequantize(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    first_token: torch.Tensor,
    row_start: torch.Tensor,
    bits: QuantizedBits,
    hadamard: bool,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Read tokens back from the pages, request after request, for attention that cannot read pages.

    first_token  int32 [R]        of each request, the first token that is wanted
    row_start    int32 [R + 1]    request r gets rows [r] to [r + 1] of the outputs
    key, value   bfloat16 or float16 [rows, H, D]; other rows are left as they are
    hadamard     whether K is rotated back
    """
    torch.ops.qoq.kv_dequantize(
        pages,
        block_table,
        first_token,
        row_start,
        *widths(bits),
        hadamard,
        key,
        value,
    )


def _fake(*_: object) -> None:
    """Stand in for an op while a graph is traced.

    The ops return nothing, and their schemas say what they write.
    """


define(
    "kv_write",
    "(Tensor key, Tensor value, Tensor slots, int k_bits, int v_bits, bool hadamard, "
    "Tensor(a!) pages, Tensor? k_mean) -> ()",
    fake=_fake,
)
define(
    "kv_decode",
    "(Tensor query, Tensor pages, Tensor block_table, Tensor seq_lens, float scale, "
    "int k_bits, int v_bits, int window, bool hadamard, Tensor(a!) out, Tensor(b!) workspace, "
    "float soft_cap, Tensor? sinks, int query_len, Tensor? query_start) -> ()",
    fake=_fake,
)
define(
    "kv_dequantize",
    "(Tensor pages, Tensor block_table, Tensor first_token, Tensor row_start, "
    "int k_bits, int v_bits, bool hadamard, Tensor(a!) key, Tensor(b!) value) -> ()",
    fake=_fake,
)
