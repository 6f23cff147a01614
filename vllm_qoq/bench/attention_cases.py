"""The cases and kernels of `bench attention`, without imports, for --help and the tests."""

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
    """A decode step: `batch` sequences of `context` tokens, the last `query_len` of them new."""

    batch: int
    context: int
    query_len: int = 1

    def __str__(self) -> str:
        several = f"x{self.query_len}" if self.query_len > 1 else ""
        return f"{self.batch}x{self.context}{several}"


DECODES = tuple(
    Decode(*pair)
    for pair in (
        *((1, 8192), (16, 1024), (16, 8192), (64, 1024)),
        *((64, 4096), (256, 1280), (256, 4096), (32, 32768)),
    )
)
WRITTEN_TOKENS = 256
PREFILL_TOKENS = 8192  # in one prompt, which has no history

# Our kernels and their peers: the bits of a number of K or V, and the bytes of a scale and zero for
# each head of K and of V. Both are averages: k8v4 has 8 bits for K and 4 for V, and TurboQuant 2
# bytes for K's norm and 4 for V.
OURS = {"qoq-kv4": (4, 4), "qoq-kv8": (8, 4), "qoq-k8v4": (6, 4)}
PEERS = {"fa3-bf16": (16, 0), "fa3-fp8": (8, 0), "triton-int4": (4, 4), "turboquant-4bit": (4, 3)}
KERNELS = (*OURS, *PEERS)

# Our kernels serve these head sizes, up to so many query heads of a KV head and new tokens of a
# sequence, and blocks whose tokens are a multiple of this, as `kv_ops` and `kv_layout` say.
HEAD_SIZES = (64, 96, 128, 256)
MAX_GROUP = 16
MAX_QUERY_LEN = 8
BLOCK_MULTIPLE = 16

# A case with a smaller cache goes round the blocks of several calls: more bytes than any L2 holds,
# even one that keeps a part of what streams through it.
_ROUND_BYTES = 1e9
_MOST_TURNS = 128


def token_bytes(kernel: str, heads: Heads) -> int:
    """Count the bytes of the cache that a token takes in one layer."""
    bits, extra = {**OURS, **PEERS}[kernel]
    return heads.kv * 2 * (heads.size * bits // 8 + extra)


def cache_bytes(kernel: str, heads: Heads, case: Decode) -> int:
    """Count the bytes of the cache that a call reads, each once."""
    return case.batch * case.context * token_bytes(kernel, heads)


def floor_seconds(kernel: str, heads: Heads, case: Decode, copy_rate: float) -> float:
    """Compute the seconds of reading the kernel's cache at `copy_rate` bytes a second."""
    return cache_bytes(kernel, heads, case) / copy_rate


def blocks(heads: Heads, case: Decode) -> int:
    """Count the blocks of all sequences of a call."""
    return case.batch * -(-case.context // heads.block_tokens)


def turns(kernel: str, heads: Heads, case: Decode) -> int:
    """Count the calls with blocks of their own that a case goes round."""
    needed = math.ceil(_ROUND_BYTES / cache_bytes(kernel, heads, case))
    return min(needed, _MOST_TURNS)


def pool_blocks(kernel: str, heads: Heads, cases: Sequence[Decode]) -> int:
    """Count the blocks of the one cache that serves all cases, the writes and the prompt."""
    written = -(-PREFILL_TOKENS // heads.block_tokens)
    return max(written, *(blocks(heads, case) * turns(kernel, heads, case) for case in cases))


def pool_bytes(kernel: str, heads: Heads, cases: Sequence[Decode]) -> int:
    """Count the bytes of the one cache that serves all cases, the writes and the prompt."""
    return pool_blocks(kernel, heads, cases) * heads.block_tokens * token_bytes(kernel, heads)
