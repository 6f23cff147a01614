"""The limits of this machine's card, measured: `python -m vllm_qoq.bench.serving.limits`.

It is a process of its own because the process that starts engines must not hold the GPU.
"""

from __future__ import annotations

import json
import platform
import sys

import torch

from vllm_qoq.measuring.gpu import copy_rate, seconds

_SIZE = 8192
# The products that are tried for each type of inputs, by their names in `bench gemm`.
_PRODUCTS = {
    "bf16": ("cublas-bf16",),
    "int8": ("cutlass-int8", "qoq-channel"),
    "fp8": ("cutlass-fp8",),
}


def measure() -> dict[str, object]:
    """Measure the name of the card, a copy's bytes a second, and products' operations a second.

    The operations are those of the fastest product of square matrices of random numbers, by type of
    the inputs; a type without a product is absent. Without a GPU only the name is known.
    """
    if not torch.cuda.is_available():
        return {"device": platform.processor() or platform.machine(), "copy_rate": None}
    found = {kind: rate for kind, names in _PRODUCTS.items() if (rate := _rate(names))}
    return {
        "device": torch.cuda.get_device_name(),
        "copy_rate": copy_rate(),
        "operations": found,
    }


def _rate(names: tuple[str, ...]) -> float:
    """Measure the operations a second of the fastest of some products; 0 where none runs."""
    from vllm_qoq.bench import peers

    best = 0.0
    for name in names:
        try:
            calls = peers.PREPARE[name](_SIZE, _SIZE)(_SIZE)
            best = max(best, 2 * _SIZE**3 / seconds(calls))
        except (RuntimeError, ValueError, ImportError, AttributeError) as error:
            print(f"left out: {name}: {str(error).splitlines()[0]}", file=sys.stderr)
    return best


if __name__ == "__main__":
    print(json.dumps(measure()))
