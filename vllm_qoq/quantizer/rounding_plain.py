"""The inner loops of rounding in plain PyTorch: the CPU's, and the oracle of the Triton kernels.

On a CPU a column is a contiguous vector, and the candidates of a search pass over rows that stay in
the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

MAX_GROUP_SCALE = 16
# So many float32 values are worked on at once: on a CPU they stay in a core's cache while the
# candidates of a search pass over them.
_CHUNK_VALUES = {"cpu": 1 << 16, "cuda": 1 << 26}

Bound = float | torch.Tensor
"""A bound of codes: one for all, or float32 [N, columns]."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep the many short operations of a loop in one thread: two wait longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def reach(below: int) -> int:
    """How far offsets are tried for the scale that is `below` the one that covers a group.

    It is half of the largest scale there can be, so that no row depends on another.
    """
    return (MAX_GROUP_SCALE - below) // 2


@one_thread()
def search(
    level1: torch.Tensor, cost: torch.Tensor, scales_below: int, shifts: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Search the integers (scale, offset) of least error for each group; returns that error, too.

    level1 is float32 [N, groups, W] and cost [groups, W]; the results are [N, groups].
    Tried are the scale that covers the group's range and the next smaller ones, each with the
    range centred; with `shifts`, also the offsets within `reach` of there.
    """
    rows, groups, width = level1.shape
    found = torch.empty(3, rows, groups, device=level1.device)
    chunk = _chunk_rows(level1.device, width)
    for group in range(groups):
        for first in range(0, rows, chunk):
            part = level1[first : first + chunk, group].contiguous()
            found[:, first : first + chunk, group] = _search(
                part, cost[group], scales_below, shifts
            )
    return found[0], found[1], found[2]


def _search(
    level1: torch.Tensor, cost: torch.Tensor, scales_below: int, shifts: bool
) -> torch.Tensor:
    """Search one group of all rows: level1 [N, W], cost [W]; scale, offset, error [3, N]."""
    low, high = level1.amin(dim=1), level1.amax(dim=1)
    cover = ((high - low) / 15).ceil().clamp(1, MAX_GROUP_SCALE)
    best = torch.stack((cover, torch.zeros_like(cover), torch.full_like(cover, torch.inf)))
    lost, codes = torch.empty_like(level1), torch.empty_like(level1)
    for below in range(scales_below + 1):
        scale = (cover - below).clamp_min(1)
        centre = (low + high) / 2 - 7.5 * scale
        scaled = level1 / scale[:, None]
        furthest = reach(below) if shifts else 0
        for shift in range(-furthest, furthest + 1):
            offset = (centre + shift).round().clamp_min(-128).minimum(127 - 15 * scale)
            torch.sub(scaled, (offset / scale)[:, None], out=lost)
            torch.round(lost, out=codes).clamp_(0, 15)
            error = lost.sub_(codes).square_() @ cost * scale.square()
            candidate = torch.stack((scale, offset, error))
            best = torch.where(error < best[2], candidate, best)
    return best


@one_thread()
def weighted_errors(
    weight: torch.Tensor,
    step: torch.Tensor,
    offset: torch.Tensor | None,
    bounds: tuple[int, int],
    cost: torch.Tensor,
) -> torch.Tensor:
    """Sum cost * error^2 of rounding each row to code * step + offset: float32 [N].

    weight [N, K], step and offset [N], cost [K]; codes lie within `bounds`
    """
    found = torch.empty_like(step)
    chunk = _chunk_rows(weight.device, weight.shape[1])
    for first in range(0, len(weight), chunk):
        rows = slice(first, first + chunk)
        scaled = weight[rows] if offset is None else weight[rows] - offset[rows, None]
        scaled = scaled / step[rows, None]
        lost = scaled.sub_(scaled.round().clamp_(*bounds)).square_()
        found[rows] = lost @ cost
    return found * step.square()


def _chunk_rows(device: torch.device, columns: int) -> int:
    return max(1, _CHUNK_VALUES[device.type] // columns)


@one_thread()
def round_columns(
    ideal: torch.Tensor, lower: torch.Tensor, low: Bound, high: Bound
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round column after column, and pass each error on to the next: codes and errors, [N, b].

    ideal  float32 [N, b], the weights in units of codes
    lower  float32 [b, b], the block of U^T. The error of column i, over U[i, i], is taken
           from column j times U[i, j].
    """
    columns = ideal.t().contiguous()  # a column is read as a row of this
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    below, above = _by_column(low, len(columns)), _by_column(high, len(columns))
    for i, diagonal in enumerate(lower.diagonal().tolist()):
        if i:
            columns[i].addmv_(errors[:i].t(), lower[i, :i], alpha=-1)
        _nearest(columns[i], below[i], above[i], codes[i])
        torch.sub(columns[i], codes[i], out=errors[i]).div_(diagonal)
    return codes.t(), errors.t()


@one_thread()
def descend(
    codes: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor, low: Bound, high: Bound
) -> torch.Tensor:
    """Round each column to what is best given all others; returns the new codes, [N, b].

    codes     float32 [N, b]
    gradient  float32 [N, b], of half the error, in units of codes
    hessian   float32 [b, b], the block of H
    """
    new, slope = codes.t().contiguous(), gradient.t().contiguous()
    changes = torch.empty_like(new)
    below, above = _by_column(low, len(new)), _by_column(high, len(new))
    for i, diagonal in enumerate(hessian.diagonal().tolist()):
        if i:
            slope[i].addmv_(changes[:i].t(), hessian[i, :i])
        torch.neg(new[i], out=changes[i])
        new[i].sub_(slope[i], alpha=1 / diagonal)
        _nearest(new[i], below[i], above[i], new[i])
        changes[i] += new[i]
    return new.t()


def _by_column(bound: Bound, columns: int) -> list[float] | torch.Tensor:
    if isinstance(bound, torch.Tensor):
        return bound.t().contiguous()
    return [bound] * columns


def _nearest(x: torch.Tensor, low: Bound, high: Bound, out: torch.Tensor) -> None:
    """Write the nearest integers to `x` from `low` to `high`; ties go to the even one."""
    torch.round(x, out=out)
    if isinstance(low, torch.Tensor) or isinstance(high, torch.Tensor):
        torch.clamp(out, torch.as_tensor(low), torch.as_tensor(high), out=out)
    else:
        out.clamp_(low, high)
