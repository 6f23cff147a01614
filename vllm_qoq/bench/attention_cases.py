"""What `bench attention` measures. Imports nothing, so that --help and the tests may read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Heads(NamedTuple):
    """The heads of a layer on one GPU, and the tokens of a block of the cache."""

    query: int = 32
    kv: int = 8
    size: int = 128
    block_tokens: int = 64


class Decode(NamedTuple):
    """One new token for each of `batch` sequences, each of `context` tokens with it."""

    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.context}"


DECODES = tuple(
    Decode(*pair)
    for pair in (
        *((1, 8192), (16, 1024), (16, 8192), (64, 1024)),
        *((64, 4096), (256, 1280), (256, 4096), (32, 32768)),
    )
)
WRITTEN_TOKENS = 256
PREFILL_TOKENS = 8192  # of one prompt, which has no history

# Our kernels and their peers: bits of a number of K or V, and bytes of a scale and zero for each
# head of K and of V; TurboQuant has 2 for K's norm and 4 for V, so 3 on average.
OURS = {"qoq-kv4": (4, 4), "qoq-kv8": (8, 4)}
PEERS = {"fa3-bf16": (16, 0), "fa3-fp8": (8, 0), "triton-int4": (4, 4), "turboquant-4bit": (4, 3)}
KERNELS = (*OURS, *PEERS)

# What our kernels serve, as in `kv_ops` and `kv_layout`: head sizes, query heads of a KV head, and
# of what the tokens of a block are a multiple.
HEAD_SIZES = (64, 128)
MAX_GROUP = 16
BLOCK_MULTIPLE = 16

# A case whose cache is smaller goes round several sequences' blocks: more bytes than any L2 holds,
# even one that keeps a part of what streams through it.
_ROUND_BYTES = 1e9
_MOST_TURNS = 128


def token_bytes(kernel: str, heads: Heads) -> int:
    """Bytes of the cache that a token takes in one layer."""
    bits, extra = {**OURS, **PEERS}[kernel]
    return heads.kv * 2 * (heads.size * bits // 8 + extra)


def cache_bytes(kernel: str, heads: Heads, case: Decode) -> int:
    """What a call reads of the cache, each byte once."""
    return case.batch * case.context * token_bytes(kernel, heads)


def floor_seconds(kernel: str, heads: Heads, case: Decode, copy_rate: float) -> float:
    """Of reading the kernel's cache where memory moves copy_rate bytes a second, both ways."""
    return cache_bytes(kernel, heads, case) / copy_rate


def blocks(heads: Heads, case: Decode) -> int:
    """Blocks of all sequences of a call."""
    return case.batch * -(-case.context // heads.block_tokens)


def turns(kernel: str, heads: Heads, case: Decode) -> int:
    """How many calls with blocks of their own a case goes round."""
    needed = math.ceil(_ROUND_BYTES / cache_bytes(kernel, heads, case))
    return min(needed, _MOST_TURNS)


def pool_blocks(kernel: str, heads: Heads, cases: Sequence[Decode]) -> int:
    """Blocks of the one cache that serves all cases, the writes and the prompt."""
    written = -(-PREFILL_TOKENS // heads.block_tokens)
    return max(written, *(blocks(heads, case) * turns(kernel, heads, case) for case in cases))


def pool_bytes(kernel: str, heads: Heads, cases: Sequence[Decode]) -> int:
    """Bytes of that cache."""
    return pool_blocks(kernel, heads, cases) * heads.block_tokens * token_bytes(kernel, heads)
