"""The mean of K after RoPE, over texts of the lengths that a model is served with.

RoPE turns a pair of channels by an angle that grows with the position, so the mean after it depends
on how long texts are: what turns fast has the mean zero, and what turns slowly keeps the mean that
it had before. Calibration texts are short. So the mean before RoPE is measured, which does not
depend on the position, and the mean turn is computed for every length from 512 tokens to the
longest that the model takes, each twice the last and as likely as the others.

What is measured only decides how much the cache loses: any constant leaves the softmax as it is.
"""

from __future__ import annotations

import torch

SHORTEST = 512
_MOST_DOUBLINGS = 24


def lengths(longest: int) -> list[int]:
    """List the lengths of text, in tokens, that the mean is taken over."""
    doubled = [SHORTEST << step for step in range(_MOST_DOUBLINGS)]
    return [length for length in doubled if length <= longest] or [longest]


def after_rope(mean: torch.Tensor, inv_freq: torch.Tensor, longest: int) -> torch.Tensor:
    """Compute the mean after RoPE, float32 [..., D], from the one before, `mean` float [..., D].

    inv_freq  float [D / 2], the angle by which each pair turns from token to token
    longest   the most tokens of a text

    RoPE is that of `strength.with_rope`.
    """
    turn = torch.stack([_mean_turn(inv_freq.double(), n) for n in lengths(longest)]).mean(dim=0)
    low, high = mean.double().chunk(2, dim=-1)
    turned = torch.complex(low, high) * turn
    return torch.cat((turned.real, turned.imag), dim=-1).float()


def sample_positions(count: int, longest: int) -> torch.Tensor:
    """Draw positions, int64 [count], as the mean weights them; always the same ones."""
    chosen = torch.tensor(lengths(longest)).repeat(count)[:count]
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(count, generator=generator, dtype=torch.float64) * chosen).long()


def _mean_turn(inv_freq: torch.Tensor, length: int) -> torch.Tensor:
    """Compute the mean of exp(i * inv_freq * position) over the positions below `length`."""
    half = inv_freq / 2
    size = (length * half).sin() / (length * half.sin())
    # A pair that does not turn, which some kinds of RoPE have, keeps its mean.
    size = torch.where(half.sin().abs() < 1e-12, 1.0, size)
    return torch.polar(torch.ones_like(half), (length - 1) * half) * size
