"""The order of the channels of a head in which RoPE turns the pairs (i, i + D / 2)."""

from __future__ import annotations

import torch


def paired_channels(size: int, turned: int, neighbors: bool) -> torch.Tensor:
    """Order the channels of a head of `size`, of which the first `turned` turn: int64 [size].

    neighbors  whether 2 i and 2 i + 1 turn together, not i and i + turned / 2
    """
    turning = torch.arange(turned)
    first, second = (turning[::2], turning[1::2]) if neighbors else turning.chunk(2)
    rest, other = torch.arange(turned, size).chunk(2) if turned < size else (turning[:0],) * 2
    return torch.cat((first, rest, second, other))
