"""Rounding of one layer, with or without what is known of its inputs."""

from vllm_qoq.quantizer import gptq
from vllm_qoq.quantizer.hessian import factored


def fill(weight, hessian, grid):
    """Round to the nearest, or with GPTQ where there is a Hessian; returns the loss of each row."""
    if hessian is None:
        return gptq.round_to_nearest(weight, grid)
    return gptq.quantize(weight, factored(hessian.clone(), "layer"), grid)


def output_error(weight, quantized, hessian):
    lost = gptq.row_losses(weight - quantized, hessian)
    return gptq.output_error(lost, gptq.row_losses(weight, hessian))
