"""Rounding of one layer, with or without what is known of its inputs."""

import torch

from vllm_qoq.quantizer import gptq
from vllm_qoq.quantizer.hessian import factored
from vllm_qoq.quantizer.sets import SetKind

KINDS = [
    *(SetKind("w8a8", 128), SetKind("w4a8", 128), SetKind("w4a8", -1)),
    *(SetKind("w4a16", 128), SetKind("w4a16", -1), SetKind("w8a8", 128, "w4a8")),
    *(SetKind("w4a8", 64), SetKind("w4a8", 32), SetKind("w8a8", 32, "w4a8")),
]


def fill(weight, hessian, grid, passes=gptq.PASSES):
    """Round to the nearest, or with GPTQ where there is a Hessian; returns the loss of each row."""
    if hessian is None:
        return gptq.round_to_nearest(weight, grid)
    return gptq.quantize(weight, factored(hessian.clone(), "layer"), grid, passes)


def round_one(kind, weight, hessian):
    """Round a layer in a set, after the one that it is nested on; returns grid and row losses."""
    base = None
    if kind.base is not None:
        base = SetKind("w4a8", kind.group_size).grid(weight, torch.bfloat16, clip=True)
        fill(weight, hessian, base)
    grid = kind.grid(weight, torch.bfloat16, True, base)
    return grid, fill(weight, hessian, grid)


def output_error(weight, quantized, hessian):
    lost = gptq.row_losses(weight - quantized, hessian)
    return gptq.output_error(lost, gptq.row_losses(weight, hessian))


def correlated_inputs(k=256, tokens=512, seed=1):
    """Correlated, with a few large channels: what GPTQ can make use of."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, k // 4, generator=random) @ torch.randn(k // 4, k, generator=random)
    x = mixed + 0.3 * torch.randn(tokens, k, generator=random)
    x[:, ::37] *= 12
    return x
