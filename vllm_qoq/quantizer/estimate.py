"""An estimate of how long a quantization takes, from a second of the same work here.

Timed are a matrix product, for the passes over the calibration text and all that is a product in
rounding; the factors of a Hessian; and `gptq.quantize` on two small layers, whose time is a
constant per column (launches, on a GPU) plus one per weight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from vllm_qoq.quantizer import gptq, matmul
from vllm_qoq.quantizer.grid import Grid
from vllm_qoq.quantizer.hessian import Inputs, factored
from vllm_qoq.quantizer.observe import SMOOTHING_TOKENS
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.products import fast_products
from vllm_qoq.quantizer.sets import SetKind
from vllm_qoq.quantizer.size import Stack

_COLUMNS = 512
_FEW_ROWS, _MANY_ROWS = 64, 512
# Products of a weight [N, K] with a Hessian in `gptq`: half of one while errors are passed on, and
# one for the first gradient. Each pass of descent is one more.
_PRODUCTS = 1.5
# The pipeline runs every block to measure its inputs, and with its new weights.
_RUNS = 2


def seconds(
    stacks: Iterable[Stack],
    options: QuantizeOptions,
    samples: int,
    dtype: torch.dtype = torch.bfloat16,
) -> float:
    """Estimate the seconds of a run.

    stacks   the layers that read one input, of all blocks
    samples  pieces of text
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = list(stacks)
    tokens = samples * options.seqlen
    has_smoothing = bool(options.smooth_attention or options.smooth_outputs or options.reorder)
    smoothed = min(tokens, SMOOTHING_TOKENS) if has_smoothing else 0
    forward = 2 * (tokens * _RUNS + smoothed) * sum(n * k * share for n, k, share in sizes)
    # A CPU leaves out what is below the diagonal.
    hessians = (2 if device.type == "cuda" else 1) * tokens * sum(k * k * s for _, k, s in sizes)
    with fast_products():
        per_flop = _seconds_per_flop(device, dtype)
    per_float32_flop = _seconds_per_flop(device, torch.float32, matmul.product)
    total = forward * per_flop
    total += hessians * (per_flop if device.type == "cuda" else per_float32_flop)
    if options.gptq:
        total += _factoring(device) * sum(k**3 for _, k, _ in sizes)
    kinds = {kind.name: kind for kind in options.kinds}
    for kind in options.kinds:
        base = kinds[kind.base] if kind.base is not None else None
        per_column, per_weight = _rounding(kind, base, options, device)
        total += sum(per_column * k + per_weight * n * k for n, k, _ in sizes)
        products = _PRODUCTS + options.passes if options.gptq else 0
        total += 2 * products * per_float32_flop * sum(n * k * k for n, k, _ in sizes)
    return total


def _seconds_per_flop(
    device: torch.device,
    dtype: torch.dtype,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.nn.functional.linear,
) -> float:
    size = 4096 if device.type == "cuda" else 512
    x = torch.randn(size, size, device=device).to(dtype)
    return min(_timed(lambda: product(x, x), device) for _ in range(3)) / (2 * size**3)


def _factoring(device: torch.device) -> float:
    """Measure the seconds of factoring a Hessian [K, K], over K^3."""
    size = 4096 if device.type == "cuda" else 512
    hessian = torch.eye(size, device=device)
    return min(_timed(lambda: factored(hessian.clone(), ""), device) for _ in range(2)) / size**3


def _rounding(
    kind: SetKind, base: SetKind | None, options: QuantizeOptions, device: torch.device
) -> tuple[float, float]:
    """Measure seconds per column and per weight of rounding, without those of `base`."""
    found = []
    for rows in (_FEW_ROWS, _MANY_ROWS):
        weight = torch.randn(rows, _COLUMNS, device=device)
        inputs = factored(torch.eye(_COLUMNS, device=device), "")
        filled = None
        if base is not None:
            filled = base.grid(weight, torch.bfloat16, options.clip)
            gptq.round_to_nearest(weight, filled)

        def run(
            weight: torch.Tensor = weight,
            inputs: Inputs = inputs,
            filled: Grid | None = filled,
        ) -> None:
            grid = kind.grid(weight, torch.bfloat16, options.clip, filled)
            if options.gptq:
                gptq.quantize(weight, inputs, grid, options.passes)
            else:
                gptq.round_to_nearest(weight, grid)

        found.append(min(_timed(run, device) for _ in range(2)))
    few, many = found
    per_weight = max(many - few, 0.0) / (_COLUMNS * (_MANY_ROWS - _FEW_ROWS))
    return max(few / _COLUMNS - per_weight * _FEW_ROWS, 0.0), per_weight


def _timed(work: Callable[[], object], device: torch.device) -> float:
    started = time.monotonic()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - started
