"""Try torch and the CUDA kernels: `python -m vllm_qoq.doctor.probe` prints one JSON object.

    is_loaded    that torch and the library of kernels were loaded
    fault        why torch cannot use CUDA, None where it can
    missing_ops  the ops of this version that the library has no kernel for, as in qoq::w4a8_gemm;
                 empty where torch cannot use CUDA
    gpus         of each GPU that torch sees: name, capability [major, minor], and why a kernel that
                 was tried failed there, None where it did not

A process of its own, because a library that does not fit may end it.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from vllm_qoq import kernel_library, ops


def probe() -> dict[str, Any]:
    """Try CUDA, and a kernel on each GPU that the library is for."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return {"is_loaded": True, "fault": _first_line(error), "missing_ops": [], "gpus": []}
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    missing = ops.missing_ops("cuda")
    return {"is_loaded": True, "fault": None, "missing_ops": missing, "gpus": gpus}


def _gpu(index: int) -> dict[str, Any]:
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    fault = None
    if ops.is_built("cuda") and kernel_library.choice(capability, kernel_library.built_for() or ()):
        try:
            x = torch.zeros(1, 128, dtype=torch.bfloat16, device=torch.device("cuda", index))
            torch.ops.qoq.quantize_per_token(x)
            torch.cuda.synchronize(index)
        except RuntimeError as error:
            fault = _first_line(error)
    return {"name": name, "capability": list(capability), "fault": fault}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    print(json.dumps(probe()))
