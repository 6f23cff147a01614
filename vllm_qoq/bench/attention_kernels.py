"""The decode attentions that can be measured: each makes calls for heads and a number of blocks.

A preparation makes one cache of random numbers in the kernel's own layout. Its `decode` gives the
calls of a case, each with a block table of its own: random blocks, which no other of the calls
reads. Its `write` gives calls that put new tokens into random places of the cache, its `prefill`
calls that write a prompt and attend to it; it is None where that is not measured. What else a call
takes is shared. The query is bfloat16, quantized beforehand where a kernel wants that.

A peer that is not installed raises ImportError; one that refuses a case raises whatever it likes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from vllm_qoq.bench import attention_cases, peers
from vllm_qoq.bench.attention_cases import PREFILL_TOKENS, WRITTEN_TOKENS, Decode, Heads
from vllm_qoq.measuring.gpu import Call
from vllm_qoq.numerics import kv_layout
from vllm_qoq.ops import kv_ops

_WRITES = 48
_FILL_TOKENS = 8192  # at a time
_PROMPTS = 4


class Kernel(NamedTuple):
    """A kernel with its cache: functions that make its calls."""

    decode: Callable[[Decode], list[Call]]
    write: Callable[[], list[Call]]
    prefill: Callable[[], list[Call]] | None


class DecodeInputs(NamedTuple):
    """The inputs that the calls of a case share."""

    query: torch.Tensor  # bfloat16 [T, Hq, D]
    lengths: torch.Tensor  # int32 [R]
    out: torch.Tensor  # bfloat16 [T, Hq, D], NaN until a call writes it


def qoq(heads: Heads, blocks: int, name: str, bits: kv_layout.QuantizedBits) -> Kernel:
    """Prepare our kernels, qoq::kv_decode and qoq::kv_write, without the rotation of K."""
    page_bytes = heads.block_tokens * kv_layout.slot_bytes(heads.size, bits)
    pages = _bytes(blocks, heads.kv, page_bytes)
    # The scales make numbers of about 1, and the zeros are in the middle of the codes.
    shape = 2, heads.block_tokens, 2  # of K and of V
    numbers = pages[..., -8 * heads.block_tokens :].view(torch.float16).unflatten(-1, shape)
    for part, width in zip(numbers.unbind(-3), kv_layout.widths(bits), strict=True):
        levels = 2**width - 1
        part[..., 0].uniform_(2 / levels, 6 / levels)
        part[..., 1].uniform_(0.3 * levels, 0.7 * levels)

    def decode(case: Decode) -> list[Call]:
        given = _inputs(heads, case)
        device, group = given.query.device, heads.query // heads.kv
        workspace = kv_ops.workspace(device, group, heads.size, case.query_len)
        starts = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.query_len
        several = (0.0, None, case.query_len, starts) if case.query_len > 1 else ()
        rest = (given.lengths, heads.size**-0.5, bits, 0, False, given.out, workspace, *several)
        return [
            partial(_then, given.out, kv_ops.kv_decode, given.query, pages, table, *rest)
            for table in _tables(heads, case, blocks, name)
        ]

    def write() -> list[Call]:
        key, value = _new_tokens(heads)
        return [
            partial(_then, key, kv_ops.kv_write, key, value, slots, bits, False, pages)
            for slots in _slots(heads, blocks)
        ]

    def prefill() -> list[Call]:
        # A prompt attends to itself unquantized, in FlashAttention, as in vllm_qoq.serving.kv.cuda.
        query, key, value, out = _prompt(heads)
        attend = peers.flash_attention_3_of_prompt(query, key, value, out)
        return [
            partial(
                _write_then,
                partial(kv_ops.kv_write, key, value, slots, bits, False, pages),
                partial(_then, out, attend),
            )
            for _, slots in _prompt_places(heads, blocks)
        ]

    return Kernel(decode, write, prefill)


def fa3(heads: Heads, blocks: int, name: str, is_fp8: bool) -> Kernel:
    """Prepare vLLM's FlashAttention 3, with K and V of a block beside each other, as vLLM does."""
    attend, store = peers.flash_attention_3(), peers.reshape_and_cache()
    # The cache is [blocks, tokens, H, 2 * D], which is cut in the middle into K and V.
    shape = blocks, heads.block_tokens, heads.kv, 2 * heads.size
    if is_fp8:
        cache = _bytes(*shape).bitwise_and_(0xBF)  # numbers of less than 2, and no NaN
        numbers = cache.view(torch.float8_e4m3fn)
    else:
        cache = numbers = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()

    def decode(case: Decode) -> list[Call]:
        given = _inputs(heads, case)
        query = given.query.to(numbers.dtype)
        parts = numbers.split(heads.size, -1)
        call = attend(heads, case, query, *parts, given.lengths, given.out, case.query_len)
        tables = _tables(heads, case, blocks, name)
        return [partial(_then, given.out, call, block_table=table) for table in tables]

    def write() -> list[Call]:
        key, value = _new_tokens(heads)
        one = torch.ones((), device="cuda")
        parts, rest = cache.split(heads.size, -1), ("fp8" if is_fp8 else "auto", one, one)
        return [
            partial(_then, key, store, key, value, *parts, slots, *rest)
            for slots in _slots(heads, blocks)
        ]

    def prefill() -> list[Call]:
        (query, key, value, out), one = _prompt(heads), torch.ones((), device="cuda")
        lengths = torch.full((1,), PREFILL_TOKENS, dtype=torch.int32, device="cuda")
        case, pair = Decode(1, PREFILL_TOKENS), numbers.split(heads.size, -1)
        call = attend(heads, case, query.to(numbers.dtype), *pair, lengths, out, PREFILL_TOKENS)
        parts, rest = cache.split(heads.size, -1), ("fp8" if is_fp8 else "auto", one, one)
        return [
            partial(
                _write_then,
                partial(store, key, value, *parts, slots, *rest),
                partial(_then, out, call, block_table=table),
            )
            for table, slots in _prompt_places(heads, blocks)
        ]

    return Kernel(decode, write, prefill)


def triton_int4(heads: Heads, blocks: int, name: str) -> Kernel:
    """Prepare vLLM's int4_per_token_head, which rotates the query, and the output back."""
    attend, store = peers.int4_attention(heads), peers.int4_reshape_and_cache()
    # The cache is [blocks, tokens, H, 2 * (D / 2 + 4)]: of K and then of V, codes and a float32
    # scale, whose low bits are the zero.
    half = heads.size // 2 + 4
    cache = _bytes(blocks, heads.block_tokens, heads.kv, 2 * half)
    words = cache.view(torch.float32)
    k_scale, v_scale = words[..., half // 4 - 1], words[..., half // 2 - 1]
    for scale in (k_scale, v_scale):
        scale.uniform_(0.02, 0.06)
    parts = cache.split(half, -1)

    def decode(case: Decode) -> list[Call]:
        _need_one_token(case)
        given = _inputs(heads, case)
        call = attend(case, given.query, *parts, k_scale, v_scale, given.lengths, given.out)
        tables = _tables(heads, case, blocks, name)
        return [partial(_then, given.out, call, block_table=table) for table in tables]

    def write() -> list[Call]:
        key, value = _new_tokens(heads)
        return [
            partial(_then, key, store, key, value, *parts, k_scale, v_scale, slots)
            for slots in _slots(heads, blocks)
        ]

    return Kernel(decode, write, None)


def turboquant(heads: Heads, blocks: int, name: str) -> Kernel:
    """Prepare vLLM's turboquant_4bit_nc, which rotates the query, but not the output."""
    attend, store = peers.turboquant_attention(heads), peers.turboquant_store(heads)
    # The cache is [blocks, tokens, H, D / 2 + 2 + D / 2 + 4]: K's codes and float16 norm, V's codes
    # and float16 scale and zero. vLLM 0.26 keeps the heads of a block apart, later vLLM its tokens.
    shape = blocks, heads.kv, heads.block_tokens, heads.size + 6
    cache = torch.empty(shape, dtype=torch.uint8, device="cuda").transpose(1, 2)
    # Random bytes would be norms, scales and zeros that are not finite.
    for slots in torch.arange(blocks * heads.block_tokens, device="cuda").split(_FILL_TOKENS):
        store(*_new_tokens(heads, len(slots)), cache, slots)

    def decode(case: Decode) -> list[Call]:
        _need_one_token(case)
        given = _inputs(heads, case)
        call = attend(given.query, cache, given.lengths, given.out)
        tables = _tables(heads, case, blocks, name)
        return [partial(_then, given.out, call, block_table=table) for table in tables]

    def write() -> list[Call]:
        key, value = _new_tokens(heads)
        return [
            partial(_then, key, store, key, value, cache, slots) for slots in _slots(heads, blocks)
        ]

    return Kernel(decode, write, None)


def _need_one_token(case: Decode) -> None:
    if case.query_len > 1:
        raise ValueError(f"measured for one new token a sequence, not for {case.query_len}")


def _write_then(write: Callable[[], object], attend: Call) -> torch.Tensor:
    write()
    return attend()


def _then(
    result: torch.Tensor, work: Callable[..., object], *args: object, **named: object
) -> torch.Tensor:
    """Do `work`, which writes into `result`, and return that as a call does."""
    work(*args, **named)
    return result


def _inputs(heads: Heads, case: Decode) -> DecodeInputs:
    shape = case.batch * case.query_len, heads.query, heads.size
    query = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device="cuda")
    return DecodeInputs(query, lengths, torch.full_like(query, torch.nan))


def _tables(heads: Heads, case: Decode, blocks: int, name: str) -> list[torch.Tensor]:
    """Make block tables int32 [R, blocks of a sequence], all of different blocks."""
    used, turns = attention_cases.blocks(heads, case), attention_cases.turns(name, heads, case)
    order = torch.randperm(blocks, device="cuda")[: used * turns].int()
    return list(order.view(turns, case.batch, -1))


def _new_tokens(heads: Heads, count: int = WRITTEN_TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    shape = 2, count, heads.kv, heads.size
    key, value = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    return key, value


def _slots(heads: Heads, blocks: int) -> list[torch.Tensor]:
    """Make random slots int64 [T] for each of some calls."""
    places = blocks * heads.block_tokens
    return [torch.randperm(places, device="cuda")[:WRITTEN_TOKENS] for _ in range(_WRITES)]


def _prompt(heads: Heads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make query, key, value and output of a prompt, bfloat16 [T, H, D]."""
    shape = PREFILL_TOKENS, heads.query + 2 * heads.kv, heads.size
    numbers = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    query, key, value = numbers.split([heads.query, heads.kv, heads.kv], 1)
    return query, key, value, torch.full_like(query, torch.nan).contiguous()


def _prompt_places(heads: Heads, blocks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Make a block table int32 [1, blocks of the prompt] and slots int64 [T] for some calls."""
    places = []
    for _ in range(_PROMPTS):
        used = -(-PREFILL_TOKENS // heads.block_tokens)
        table = torch.randperm(blocks, device="cuda")[:used]
        token = torch.arange(heads.block_tokens, device="cuda")
        slots = (table[:, None] * heads.block_tokens + token).flatten()[:PREFILL_TOKENS]
        places.append((table[None].int(), slots))
    return places


def _bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")


# The order is that of attention_cases.KERNELS.
PREPARE: dict[str, Callable[[Heads, int], Kernel]] = {
    "qoq-kv4": partial(qoq, name="qoq-kv4", bits=4),
    "qoq-kv8": partial(qoq, name="qoq-kv8", bits=8),
    "qoq-k8v4": partial(qoq, name="qoq-k8v4", bits="k8v4"),
    "fa3-bf16": partial(fa3, name="fa3-bf16", is_fp8=False),
    "fa3-fp8": partial(fa3, name="fa3-fp8", is_fp8=True),
    "triton-int4": partial(triton_int4, name="triton-int4"),
    "turboquant-4bit": partial(turboquant, name="turboquant-4bit"),
}
