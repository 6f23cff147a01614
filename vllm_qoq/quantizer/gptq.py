"""GPTQ (arXiv 2210.17323) for any grid: round a column, pass its error on to the next ones.

A few passes of coordinate descent follow: GPTQ decides on a column without those after it,
and a pass looks at each again given all others. On layers of a 16 M Llama three passes take
5 % off the output error that GPTQ leaves.

llmcompressor's GPTQ rounds to one scale per group. Here the grid decides, and it may
choose a group's parameters when the group is reached, from weights that already carry
the errors of the columns before: that is what the integer grid of QoQ needs.

Layers with one input are rounded as one, row below row. `rounding` has the loops over columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vllm_qoq.quantizer import matmul, rounding
from vllm_qoq.quantizer.grid import Grid
from vllm_qoq.quantizer.hessian import Inputs

PASSES = 3
"""So many passes of descent, unless the options say otherwise; after these, little is gained."""


@torch.no_grad()
def round_to_nearest(weight: torch.Tensor, grid: Grid) -> None:
    """Fill `grid` with the nearest codes of `weight` float [N, K]."""
    weight = weight.float()
    importance = torch.ones(weight.shape[1], device=weight.device)
    grid.prepare(weight, importance)
    for columns in _pieces(0, weight.shape[1], grid.width):
        grid.start(weight[:, columns], importance[columns], columns.start)
        codes = grid.scaled(weight[:, columns], columns.start).round_()
        low, high = (torch.as_tensor(x).to(codes) for x in grid.bounds(columns.start))
        grid.store(codes.clamp_(low, high), columns.start)
    grid.settle(weight)


@torch.no_grad()
def quantize(
    weight: torch.Tensor, inputs: Inputs, grid: Grid, passes: int = PASSES
) -> torch.Tensor:
    """Fill `grid` with the codes of `weight` float [N, K], by GPTQ and `passes` of descent.

    Returns |W x - W' x|^2 of each row, the mean over the calibration inputs: float32 [N].
    """
    target = weight.masked_fill(inputs.dead, 0)
    _pass_errors_on(target.to(torch.float32, copy=True), inputs, grid)
    # The gradient of half the loss is kept up to date from here on.
    gradient = matmul.product(grid.dequantized().sub_(target), inputs.hessian)
    for _ in range(passes):
        _descend(gradient, inputs.hessian, grid)
    difference = grid.dequantized().sub_(target)
    # The loss is that of the Hessian without damping.
    gradient.addcmul_(difference, inputs.added, value=-1)
    lost = _row_products(difference, gradient).clamp_min_(0)
    gradient.addcmul_(difference, inputs.added)
    # Each weight as it would be if it were not rounded, given all others.
    ideal = gradient.div_(-inputs.hessian.diagonal()).add_(difference).add_(target)
    del difference
    grid.settle(ideal)
    return lost


@torch.no_grad()
def row_losses(difference: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Compute |d x|^2, the mean over inputs, of each row d of `difference` [N, K]: float32 [N]."""
    return _row_products(matmul.product(difference, hessian), difference)


def _row_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Compute the dot products of rows [N, K], without another matrix of their size."""
    return torch.bmm(left[:, None], right[:, :, None]).flatten()


def output_error(lost: torch.Tensor, whole: torch.Tensor) -> float:
    """Compute |W x - W' x| / |W x| from the squares of the rows of a layer, float32 [N]."""
    return float((lost.sum() / whole.sum().clamp_min(1e-30)).clamp_min(0).sqrt())


def _pass_errors_on(weight: torch.Tensor, inputs: Inputs, grid: Grid) -> None:
    """Round from left to right; `weight` float32 [N, K] is used up.

    What lies beyond a panel gets the errors of all its columns at once.
    """
    importance = inputs.importance
    grid.prepare(weight, importance)
    for panel in _pieces(0, weight.shape[1], matmul.PANEL):
        errors = torch.empty_like(weight[:, panel])
        for columns in _pieces(panel.start, panel.stop, grid.width):
            first = columns.start
            block = weight[:, columns]
            form = rounding.on(weight.device, block.shape[1])
            grid.start(block, importance[columns], first)
            lower = inputs.lower[columns, columns].contiguous()
            ideal = grid.scaled(block, first)
            codes, lost = form.round_columns(ideal, lower, *grid.bounds(first))
            grid.store(codes, first)
            mine = errors[:, first - panel.start : columns.stop - panel.start]
            torch.mul(lost, grid.step(first), out=mine)
            rest = slice(columns.stop, panel.stop)
            weight[:, rest].addmm_(mine, inputs.lower[rest, columns].t(), alpha=-1)
        beyond = slice(panel.stop, None)
        lower = inputs.lower[beyond, panel].t()
        matmul.add_product(weight[:, beyond], errors, lower, alpha=-1)


def _descend(gradient: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> None:
    """Round each column to what is best given all others, block by block.

    gradient  float32 [N, K], (W' - W) H, which is kept up to date: a panel's own part at once, the
              rest when the panel is done
    """
    for panel in _pieces(0, gradient.shape[1], matmul.PANEL):
        slopes = gradient[:, panel].clone()
        changes = torch.empty_like(slopes)
        for columns in _pieces(panel.start, panel.stop, grid.width):
            first = columns.start
            here = slice(first - panel.start, columns.stop - panel.start)
            step, codes = grid.step(first), grid.codes[:, columns].float()
            form = rounding.on(gradient.device, codes.shape[1])
            within = hessian[columns, columns].contiguous()
            new = form.descend(codes, slopes[:, here] / step, within, *grid.bounds(first))
            grid.store(new, first)
            torch.mul(new.sub_(codes), step, out=changes[:, here])
            rest = slice(columns.stop, panel.stop)
            slopes[:, here.stop :].addmm_(changes[:, here], hessian[columns, rest])
        matmul.add_product(gradient, changes, hessian[panel])


def _pieces(start: int, stop: int, width: int) -> Iterator[slice]:
    """Cut columns into pieces of `width`; the last one may be narrower."""
    for first in range(start, stop, width):
        yield slice(first, min(first + width, stop))
