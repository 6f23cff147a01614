"""GPTQ (arXiv 2210.17323) for any grid: round a column, pass its error on to the next ones.

A few passes of coordinate descent follow: GPTQ decides on a column without those after it,
and a pass looks at each again given all others. On layers of a 16 M Llama three passes take
5 % off the output error that GPTQ leaves.

llmcompressor's GPTQ rounds to one scale per group. Here the grid decides, and it may
choose a group's parameters when the group is reached, from weights that already carry
the errors of the columns before: that is what the integer grid of QoQ needs.
"""

from __future__ import annotations

import torch

from vllm_qoq.quantizer import QuantizeError
from vllm_qoq.quantizer.grid import Grid

_DAMPINGS = (0.01, 0.1, 1.0)
_PASSES = 3


@torch.no_grad()
def quantize(weight: torch.Tensor, hessian: torch.Tensor | None, grid: Grid, layer: str) -> None:
    """Fill `grid` with the codes of `weight` float [N, K].

    hessian  float32 [K, K], the mean of x x^T over the inputs; None to round to nearest
    layer    the name of the layer, for the QuantizeError when the Hessian cannot be factored
    """
    weight = weight.float().clone()
    k = weight.shape[1]
    if hessian is None:
        factor = torch.eye(k, device=weight.device)
    else:
        dead = hessian.diagonal() == 0
        weight[:, dead] = 0
        hessian, factor = _damped(hessian, dead, layer)
    target = weight.clone()
    importance = factor.diagonal().square().reciprocal()
    grid.prepare(weight, importance)
    for first in range(0, k, grid.block):
        last = min(first + grid.block, k)
        block = weight[:, first:last]
        grid.start(block, importance[first:last], first)
        errors = torch.zeros_like(block)
        for i in range(last - first):
            column = block[:, i]
            error = (column - grid.round(column, first + i)) / factor[first + i, first + i]
            block[:, i + 1 :] -= error[:, None] * factor[first + i, first + i + 1 : last]
            errors[:, i] = error
        weight[:, last:] -= errors @ factor[first:last, last:]
    if hessian is not None:
        for _ in range(_PASSES):
            _descend(target, hessian, grid)


def _descend(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> None:
    """Round each column to what is best given all others, block by block."""
    values = grid.dequantized()
    gradient = (values - weight) @ hessian
    diagonal = hessian.diagonal()
    k = weight.shape[1]
    for first in range(0, k, grid.block):
        last = min(first + grid.block, k)
        block, before = values[:, first:last], values[:, first:last].clone()
        local, within = gradient[:, first:last].clone(), hessian[first:last, first:last]
        for i in range(last - first):
            best = block[:, i] - local[:, i] / diagonal[first + i]
            change = grid.round(best, first + i) - block[:, i]
            block[:, i] += change
            local += change[:, None] * within[i]
        gradient += (block - before) @ hessian[first:last]


def output_error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """Compute |W x - W' x| / |W x|, root mean square over the calibration inputs."""
    difference = weight.float() - quantized
    lost = ((difference @ hessian) * difference).sum()
    whole = ((weight.float() @ hessian) * weight.float()).sum()
    return float((lost / whole.clamp_min(1e-30)).clamp_min(0).sqrt())


def _damped(
    hessian: torch.Tensor, dead: torch.Tensor, layer: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Damp the Hessian; returns it and the upper Cholesky factor of its inverse."""
    mean = hessian.diagonal().mean()
    for damping in _DAMPINGS:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        damped.diagonal()[dead] = mean.clamp_min(1e-8)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and factor.isfinite().all():
            return damped, factor
    raise QuantizeError(
        f"{layer}: the inputs seen in calibration do not determine its weights; give more text "
        "(--samples, --seqlen)"
    )
