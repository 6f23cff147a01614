"""The inner loops of rounding as Triton kernels, for CUDA: see `rounding_plain`, their oracle.

One program takes a tile of rows through a block of columns. A column needs the ones before it in
one sum over the tile, so nothing but codes and errors is written, and the columns of the block
wait for nobody but their own rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_qoq.numerics import GROUP_SIZES
from vllm_qoq.quantizer.rounding_plain import MAX_GROUP_SCALE, Bound

_ROWS = 16
# Without fused multiply-adds the kernels round where the oracle does.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_MAX_SCALE = tl.constexpr(MAX_GROUP_SCALE)
# Added to a number of less than 2^22 and taken off again, this leaves the nearest integer, the
# even one of two: float32 has no digits behind the point there.
_ROUNDER = tl.constexpr(1.5 * 2**23)


@triton.jit
def _nearest(x, low, high):
    """Take the nearest integers from `low` to `high`, which are integers themselves."""
    return (tl.minimum(tl.maximum(x, low), high) + _ROUNDER) - _ROUNDER


@triton.jit
def _search_kernel(
    level1_ptr,
    cost_ptr,
    scale_ptr,
    offset_ptr,
    error_ptr,
    rows,
    groups,
    SCALES_BELOW: tl.constexpr,
    SHIFTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Search one group of a tile of rows: level1 [N, groups, W], results [N, groups]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    column = tl.arange(0, WIDTH)
    is_row = row < rows
    place = (row.to(tl.int64) * groups + group)[:, None] * WIDTH + column[None, :]
    level1 = tl.load(level1_ptr + place, mask=is_row[:, None], other=0.0)
    cost = tl.load(cost_ptr + group * WIDTH + column)[None, :]
    low, high = tl.min(level1, axis=1), tl.max(level1, axis=1)
    cover = tl.minimum(tl.maximum(tl.ceil(tl.div_rn(high - low, 15.0)), 1.0), 1.0 * _MAX_SCALE)
    best_scale, best_offset = cover, tl.zeros_like(cover)
    best = tl.full([ROWS], float("inf"), tl.float32)
    for below in range(SCALES_BELOW + 1):
        scale = tl.maximum(cover - below, 1.0)
        centre = (low + high) / 2 - 7.5 * scale
        scaled = tl.div_rn(level1, scale[:, None] + tl.zeros_like(level1))
        furthest = (_MAX_SCALE - below) // 2 if SHIFTS else 0
        for shift in range(-furthest, furthest + 1):
            offset = _nearest(centre + shift, -128.0, 127 - 15 * scale)
            lost = scaled - tl.div_rn(offset, scale)[:, None]
            lost = lost - _nearest(lost, 0.0, 15.0)
            error = tl.sum(lost * lost * cost, axis=1) * scale * scale
            is_better = error < best
            best = tl.where(is_better, error, best)
            best_scale = tl.where(is_better, scale, best_scale)
            best_offset = tl.where(is_better, offset, best_offset)
    found = row * groups + group
    tl.store(scale_ptr + found, best_scale, mask=is_row)
    tl.store(offset_ptr + found, best_offset, mask=is_row)
    tl.store(error_ptr + found, best, mask=is_row)


@triton.jit
def _round_kernel(
    ideal_ptr,
    lower_ptr,
    low_ptr,
    high_ptr,
    codes_ptr,
    errors_ptr,
    rows,
    low,
    high,
    BOUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Round a tile of rows, column after column; BOUNDS says whether each code has its own."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    is_row = row < rows
    start = row.to(tl.int64) * WIDTH
    codes = tl.zeros([ROWS, WIDTH], tl.float32)
    errors = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in range(WIDTH):
        # What comes after column i has no error yet.
        factors = tl.load(lower_ptr + i * WIDTH + column, mask=column < i, other=0.0)
        diagonal = tl.load(lower_ptr + i * WIDTH + i)
        ideal = tl.load(ideal_ptr + start + i, mask=is_row, other=0.0)
        if BOUNDS:
            lowest = tl.load(low_ptr + start + i, mask=is_row, other=0.0)
            highest = tl.load(high_ptr + start + i, mask=is_row, other=0.0)
        else:
            lowest, highest = low, high
        ideal -= tl.sum(errors * factors[None, :], axis=1)
        code = _nearest(ideal, lowest, highest)
        error = tl.div_rn(ideal - code, diagonal + tl.zeros_like(code))
        is_here = column[None, :] == i
        codes = tl.where(is_here, code[:, None], codes)
        errors = tl.where(is_here, error[:, None], errors)
    place = start[:, None] + column[None, :]
    tl.store(codes_ptr + place, codes, mask=is_row[:, None])
    tl.store(errors_ptr + place, errors, mask=is_row[:, None])


@triton.jit
def _descend_kernel(
    codes_ptr,
    gradient_ptr,
    hessian_ptr,
    low_ptr,
    high_ptr,
    new_ptr,
    rows,
    low,
    high,
    BOUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Take a tile of rows through a pass; BOUNDS says whether each code has its own."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    is_row = row < rows
    start = row.to(tl.int64) * WIDTH
    place = start[:, None] + column[None, :]
    before = tl.load(codes_ptr + place, mask=is_row[:, None], other=0.0)
    changes = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in range(WIDTH):
        # A row of H is a column; what comes after column i has not changed yet.
        factors = tl.load(hessian_ptr + i * WIDTH + column, mask=column < i, other=0.0)
        diagonal = tl.load(hessian_ptr + i * WIDTH + i)
        gradient = tl.load(gradient_ptr + start + i, mask=is_row, other=0.0)
        code = tl.load(codes_ptr + start + i, mask=is_row, other=0.0)
        if BOUNDS:
            lowest = tl.load(low_ptr + start + i, mask=is_row, other=0.0)
            highest = tl.load(high_ptr + start + i, mask=is_row, other=0.0)
        else:
            lowest, highest = low, high
        gradient += tl.sum(changes * factors[None, :], axis=1)
        ideal = code - tl.div_rn(gradient, diagonal + tl.zeros_like(code))
        change = _nearest(ideal, lowest, highest) - code
        changes = tl.where(column[None, :] == i, change[:, None], changes)
    tl.store(new_ptr + place, before + changes, mask=is_row[:, None])


def search(
    level1: torch.Tensor, cost: torch.Tensor, scales_below: int, shifts: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `rounding_plain.search`."""
    rows, groups, width = level1.shape
    assert width in GROUP_SIZES
    scale, offset, error = torch.empty(3, rows, groups, device=level1.device)
    _search_kernel[(triton.cdiv(rows, _ROWS), groups)](
        level1.contiguous(),
        cost.contiguous(),
        scale,
        offset,
        error,
        rows,
        groups,
        SCALES_BELOW=scales_below,
        SHIFTS=shifts,
        ROWS=_ROWS,
        WIDTH=width,
        **_OPTIONS,
    )
    return scale, offset, error


def round_columns(
    ideal: torch.Tensor, lower: torch.Tensor, low: Bound, high: Bound
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `rounding_plain.round_columns`."""
    ideal = ideal.contiguous()
    codes, errors = torch.empty_like(ideal), torch.empty_like(ideal)
    _launch(_round_kernel, (ideal, lower), low, high, (codes, errors))
    return codes, errors


def descend(
    codes: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor, low: Bound, high: Bound
) -> torch.Tensor:
    """See `rounding_plain.descend`."""
    codes = codes.contiguous()
    new = torch.empty_like(codes)
    _launch(_descend_kernel, (codes, gradient.contiguous(), hessian), low, high, (new,))
    return new


def _launch(
    kernel: Any,
    read: tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    low: Bound,
    high: Bound,
    written: tuple[torch.Tensor, ...],
) -> None:
    """Run a kernel over all rows of [N, W]; bounds are one for all codes or one for each."""
    rows, width = read[0].shape
    assert width in GROUP_SIZES and all(tensor.is_contiguous() for tensor in read)
    bounds: tuple[Any, ...]
    if isinstance(low, torch.Tensor) and isinstance(high, torch.Tensor):
        bounds, has_bounds = (low.contiguous(), high.contiguous()), True
        limits = (0.0, 0.0)
    else:
        bounds, has_bounds = (read[0], read[0]), False  # These pointers are not read.
        limits = (float(low), float(high))
    kernel[(triton.cdiv(rows, _ROWS),)](
        *read,
        *bounds,
        *written,
        rows,
        *limits,
        BOUNDS=has_bounds,
        ROWS=_ROWS,
        WIDTH=width,
        **_OPTIONS,
    )
