"""The question whether a bias of K is too large for a quantized KV cache.

All channels of a token's key in one head share a scale. A bias that is far larger than what
differs between tokens takes the whole range, so that the rest of the key falls between two
codes. The scores do not need it: it adds nearly the same to the score of every key, and the
softmax does not see that.
"""

from __future__ import annotations

import math

import torch

from vllm_qoq.numerics import kv_layout
from vllm_qoq.numerics.reference_attention import hadamard
from vllm_qoq.numerics.rope_pairs import paired_channels

TOKENS = 32
"""Random inputs that `score_noise` wants the outputs of."""

# Scores are exponents: an error of this size changes a weight of the softmax by a third.
_LIMIT = 0.3
# The bias counts as the cause only if the error is this many times as large as without it.
_SHARE = 3.0


def random_inputs(size: int, like: torch.Tensor) -> torch.Tensor:
    """Draw inputs like those after a norm: [TOKENS, size], with the dtype and device of `like`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(TOKENS, size, generator=generator).to(like.device, like.dtype)


def is_too_large(
    queries: torch.Tensor, keys: torch.Tensor, turned: torch.Tensor, bits: int, use_hadamard: bool
) -> bool:
    """Whether the bias spoils the scores in a cache whose keys have `bits`, 4 or 8.

    queries  float [TOKENS, heads, D] of random inputs, with their bias
    keys     float [TOKENS, kv_heads, D] of the same inputs, without it
    turned   float [TOKENS, kv_heads, D], what the cache gets of the bias, which the keys lack
    """
    noise, without = score_noise(queries, keys, turned, bits, use_hadamard)
    return bool(((noise > _LIMIT) & (noise > _SHARE * without)).any())


def turned(
    bias: torch.Tensor, rotary_dim: int | None = None, neighbors: bool = False
) -> torch.Tensor:
    """Turn a bias, float [kv_heads, D], as RoPE may at TOKENS positions: [TOKENS, kv_heads, D].

    rotary_dim  how many channels of a head RoPE turns, the first ones; all by default
    neighbors   whether the channels 2 i and 2 i + 1 turn together, not i and i + rotary_dim / 2

    RoPE turns it by another angle at every position; random angles stand for those here.
    """
    size = bias.shape[-1]
    rotary_dim = size if rotary_dim is None else rotary_dim
    channels = paired_channels(size, rotary_dim, neighbors).to(bias.device)
    paired = bias.float()[..., channels]
    low, high = paired.chunk(2, dim=-1)
    magnitude = torch.hypot(low, high)
    generator = torch.Generator().manual_seed(1)
    angles = torch.rand(TOKENS, 1, low.shape[-1], generator=generator).to(bias.device) * math.tau
    found = torch.cat((magnitude * angles.cos(), magnitude * angles.sin()), dim=-1)
    return torch.where(channels < rotary_dim, found, paired)[..., channels.argsort()]


def score_noise(
    queries: torch.Tensor, keys: torch.Tensor, turned: torch.Tensor, bits: int, use_hadamard: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate the root mean square error of a score, with and without the bias.

    The arguments are those of `is_too_large`. Returns two tensors, float32 [kv_heads].
    """
    keys = keys.float()
    kv_heads, size = keys.shape[1:]
    per_query = queries.float().square().sum(dim=-1)  # [TOKENS, heads]
    queried = per_query.view(len(queries), kv_heads, -1).mean(dim=(0, 2)).sqrt()

    def error(vectors: torch.Tensor) -> torch.Tensor:
        vectors = hadamard(vectors) if use_hadamard else vectors
        lost = kv_layout.dequantize(*kv_layout.quantize(vectors, bits)) - vectors
        # A query meets the error of every channel, and scores are divided by sqrt(D).
        return lost.square().mean(dim=(0, 2)).sqrt() * queried / math.sqrt(size)

    return error(keys + turned), error(keys)


def warning(layers: list[str], bits: int, remedy: str) -> str:
    """Say that the bias of `layers` is too large, and what to do."""
    shown = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
    return (
        f"the bias of K is so large that a KV cache with keys of {bits} bits loses what differs "
        f"between keys, in "
        f"{shown}; {remedy}"
    )
