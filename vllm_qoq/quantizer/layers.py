"""Rounding the layers that share an input, in every set at once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from vllm_qoq.quantizer import gptq
from vllm_qoq.quantizer.grid import Grid
from vllm_qoq.quantizer.hessian import factored
from vllm_qoq.quantizer.nested import Nested
from vllm_qoq.quantizer.report import LayerError
from vllm_qoq.quantizer.sets import SetKind


@dataclass(frozen=True)
class RoundedLayer:
    """A layer in one set: its filled grid, and its row of the report."""

    kind: SetKind
    grid: Grid
    row: LayerError


@torch.no_grad()
def round_layers(
    weights: Mapping[str, torch.Tensor],
    hessian: torch.Tensor,
    sets: Iterable[SetKind],
    use_gptq: bool,
    clip: bool,
    passes: int = gptq.PASSES,
) -> dict[str, list[RoundedLayer]]:
    """Round the layers with one input in every set; results are in the order of `sets`.

    weights   float [N, K] by the layer's name; their rows are rounded together
    hessian   float32 [K, K], the mean of x x^T over the inputs, which is changed
    use_gptq  whether rounding errors are passed on, or else weights rounded to the nearest
    clip      whether scales that clip are tried
    passes    of descent after the rounding errors have been passed on

    Raises QuantizeError with the name of the first layer if the Hessian cannot be factored.
    """
    kinds = list(sets)
    stacked = torch.cat(list(weights.values()))
    whole = gptq.row_losses(stacked.float(), hessian)
    inputs = factored(hessian, next(iter(weights))) if use_gptq else None
    grids: dict[str, Grid] = {}
    rows: dict[str, list[LayerError]] = {}
    # A base comes before what is a residual on it.
    for kind in sorted(kinds, key=lambda kind: kind.base is not None):
        started = time.monotonic()
        base = grids[kind.base] if kind.base is not None else None
        grid = grids[kind.name] = kind.grid(stacked, stacked.dtype, clip, base)
        if inputs is not None:
            lost = gptq.quantize(stacked, inputs, grid, passes)
        else:
            gptq.round_to_nearest(stacked, grid)
            lost = gptq.row_losses(grid.dequantized().sub_(stacked), hessian)
        rows[kind.name] = _rows(weights, kind, grid, lost, whole, started)
    found: dict[str, list[RoundedLayer]] = {}
    for index, (name, part) in enumerate(_parts(weights)):
        found[name] = [
            RoundedLayer(kind, grids[kind.name].rows(part.start, part.stop), rows[kind.name][index])
            for kind in kinds
        ]
    return found


def _parts(weights: Mapping[str, torch.Tensor]) -> Iterable[tuple[str, slice]]:
    """Find the rows of each layer in the stack of all."""
    first = 0
    for name, weight in weights.items():
        yield name, slice(first, first + len(weight))
        first += len(weight)


def _rows(
    weights: Mapping[str, torch.Tensor],
    kind: SetKind,
    grid: Grid,
    lost: torch.Tensor,
    whole: torch.Tensor,
    started: float,
) -> list[LayerError]:
    """Make the rows of the report; layers share the time by their sizes."""
    rows: list[LayerError] = []
    for name, part in _parts(weights):
        row: LayerError = {
            "layer": name,
            "set": kind.name,
            "output_error": gptq.output_error(lost[part], whole[part]),
            "seconds": 0.0,
        }
        if isinstance(grid, Nested):
            row["clipped_share"] = grid.rows(part.start, part.stop).clipped_share()
        rows.append(row)
    seconds = time.monotonic() - started  # The errors came back, so a GPU is done, too.
    for row in rows:
        row["seconds"] = round(seconds * len(weights[row["layer"]]) / len(lost), 3)
    return rows
