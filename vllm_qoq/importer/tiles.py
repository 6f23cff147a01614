"""Conversion of QServe's memory order, made for its kernel's registers, to rows and columns.

`qweight` int8 [N, K / 2] is only a view. Its bytes are tiles of 32 rows x 32 columns,
512 bytes each, row of tiles by row of tiles. In a tile, row r and column c are at

    byte    r % 8 * 64  +  c / 4 % 4 * 16  +  c / 16 * 8  +  r / 8 % 2 * 4  +  c % 4
    nibble  r / 16      0 is the low one

`s2_scales` and `s2_zeros` int8 [groups, N] permute the channels of each 32:

    qserve          channel r is at  r % 8 * 4  +  r / 8             0 8 16 24 1 9 17 25 ...
    deepcompressor  channel r is at  r / 16 * 16  +  r % 8 * 2  +  r / 8 % 2   0 8 1 9 2 10 ...

The second is what deepcompressor's own converter writes; no kernel reads it so.
"""

from __future__ import annotations

from typing import Literal

import torch

TILE = 32
_LOW_NIBBLES = 0x0F0F0F0F
S2Order = Literal["qserve", "deepcompressor"]
S2_ORDERS: tuple[S2Order, ...] = ("qserve", "deepcompressor")


def unpack_tiles(qweight: torch.Tensor) -> torch.Tensor:
    """Unpack the codes 0..15 of a `qweight` int8 [N, K / 2] to uint8 [N, K], row-major."""
    n, k = qweight.shape[0], qweight.shape[1] * 2
    # Four columns move at a time, in an int32, because c % 4 comes last in both layouts.
    # They are cloned, because a pickled tensor may begin at any byte of its storage.
    words = qweight.clone(memory_format=torch.contiguous_format).view(torch.int32)
    # The axes are row of tiles, column of tiles, r % 8, c / 4 % 4, c / 16, r / 8 % 2.
    tiles = words.view(n // TILE, k // TILE, 8, 4, 2, 2)
    codes = torch.stack((tiles & _LOW_NIBBLES, (tiles >> 4) & _LOW_NIBBLES))  # r / 16 in front
    return codes.permute(1, 0, 6, 3, 2, 5, 4).reshape(n, k // 4).view(torch.uint8)


def channels_first(stored: torch.Tensor, order: S2Order) -> torch.Tensor:
    """Reorder `s2_scales` or `s2_zeros` [groups, N] to [N, groups] with channel n in row n."""
    groups, n = stored.shape
    if order == "qserve":
        channels = stored.reshape(groups, n // TILE, 8, 4).transpose(2, 3)
    else:
        channels = stored.reshape(groups, n // TILE, 2, 8, 2).transpose(3, 4)
    return channels.reshape(groups, n).t().contiguous()
