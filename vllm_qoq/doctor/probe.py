"""Try torch and the CUDA kernels: `python -m vllm_qoq.doctor.probe` prints MARK and a JSON object.

    is_loaded    that torch and the library of kernels were loaded
    fault        why they were not, or why torch cannot use CUDA; None where it can
    missing_ops  the ops of this version that the library has no kernel for, as in qoq::w4a8_gemm;
                 empty where torch cannot use CUDA
    gpus         of each GPU that torch sees: name, capability [major, minor]; why a kernel failed
                 there, None where none did; the ops that were tried; and what of them came out
                 wrong (`doctor.trial`)

A process of its own, because a library that does not fit may end it.
"""

from __future__ import annotations

import json
from typing import Any

# Torch and the kernels are imported in the functions: that is what is tried.

# A library may print lines of its own, also at exit.
MARK = "vllm-qoq probe: "


def probe() -> dict[str, Any]:
    """Try torch, CUDA, and all kernels on each GPU that the library is for."""
    try:
        import torch

        from vllm_qoq import ops
    except Exception as error:  # a library that does not load raises anything
        return broken(root_cause(error))
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return {**broken(_first_line(error)), "is_loaded": True}
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    missing = ops.missing_ops("cuda")
    return {"is_loaded": True, "fault": None, "missing_ops": missing, "gpus": gpus}


def broken(fault: str) -> dict[str, Any]:
    """Make the result where torch or the library was not loaded."""
    return {"is_loaded": False, "fault": fault, "missing_ops": [], "gpus": []}


def root_cause(error: BaseException) -> str:
    """Describe in a line the first of the errors of which `error` is the last."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        context = None if cause.__suppress_context__ else cause.__context__
        cause = cause.__cause__ or context
    return f"{type(seen[-1]).__name__}: {_first_line(seen[-1])}"


def _gpu(index: int) -> dict[str, Any]:
    import torch

    from vllm_qoq import kernel_library, ops

    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    fault = None
    tried: list[str] = []
    wrong: list[str] = []
    if ops.is_built("cuda") and kernel_library.choice(capability, kernel_library.built_for() or ()):
        from vllm_qoq.doctor import trial

        try:
            with torch.cuda.device(index):
                found = trial.run(torch.device("cuda", index))
            tried, wrong = sorted(found.tried), found.wrong
        except RuntimeError as error:
            fault = _first_line(error)
    return {
        **{"name": name, "capability": list(capability)},
        **{"fault": fault, "tried": tried, "wrong": wrong},
    }


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    # On a line of its own, and in one write, whatever a library leaves in its buffers.
    print(f"\n{MARK}{json.dumps(probe())}", flush=True)
