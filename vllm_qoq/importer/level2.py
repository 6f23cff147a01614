"""Conversion of QoQ's second level, `W8 = q * group_scale + offset`, from QServe's.

QServe's kernel adds a byte, so its `s2_zeros` is the offset modulo 256: an offset of
-240 (codes 8..15 of scale 16) is stored as 16. Ours must not wrap for a code that occurs.
"""

from __future__ import annotations

import torch

CLEAN, UNUSUAL, BROKEN = 0, 1, 2
MAX_SCALE = 16
_LOW, _HIGH = -128, 127


def extent(codes: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the smallest and the largest code of each group: uint8 [N, K] to int16 [N, groups]."""
    low, high = codes.view(codes.shape[0], groups, -1).aminmax(dim=-1)
    return low.to(torch.int16), high.to(torch.int16)


def fits(
    low: torch.Tensor, high: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """Find the groups whose weights int8 holds: bool [N, groups]. All arguments are int16."""
    return (low * scale + offset >= _LOW) & (high * scale + offset <= _HIGH)


def unwrap(
    low: torch.Tensor, high: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Find the offsets, int16, that `s2_zeros` (int8 [N, groups]) mean, and how sound they are.

    CLEAN     all are in -255..0, as both converters write them
    UNUSUAL   some are positive; the weights are still those of QServe's kernel
    BROKEN    some groups leave int8 either way, so these are not their scales and zeros
    """
    plain = zeros.to(torch.int16)
    negative = torch.where(plain > 0, plain - 256, plain)
    is_negative = fits(low, high, scale, negative)
    if is_negative.all():
        return negative, CLEAN
    is_sound = is_negative | fits(low, high, scale, plain)
    return torch.where(is_negative, negative, plain), UNUSUAL if is_sound.all() else BROKEN


def canonical(
    codes: torch.Tensor, low: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewrite codes uint8 [N, K] and offsets int8 [N, groups] so that they never wrap.

    `offset` int16 must fit (`fits`). Where it is below int8, the group's codes begin
    above 0 and can be moved down: q * s + o == (q - low) * s + (o + low * s).
    """
    shift = torch.where(offset < _LOW, low, 0)
    groups = codes.view(*offset.shape, -1) - shift.to(torch.uint8)[:, :, None]
    return groups.view_as(codes), (offset + shift * scale).to(torch.int8)
