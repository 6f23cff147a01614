"""The registry in which ops are defined, and the library of CUDA kernels behind them.

Ops are defined in Python, so that they exist, trace and run on the CPU in every build. A build
with VLLM_QOQ_CUDA=1 has a library in the package (`vllm_qoq.kernel_library`), which adds the CUDA
kernels; it is loaded where torch has CUDA, and a library that cannot be loaded is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library, register_fake

from vllm_qoq import kernel_library

_NAMESPACE = "qoq"
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
# The ops live as long as this object.
_library = Library(_NAMESPACE, "DEF")
# The ops that a build has, by the type of device.
_ops: dict[str, list[str]] = {"cpu": [], "cuda": []}


def define(
    name: str, schema: str, fake: Callable[..., Any], cpu: Callable[..., Any] | None = None
) -> None:
    """Define the op `qoq::name`; `cpu` computes it on the CPU, where it runs there at all."""
    _library.define(name + schema)
    register_fake(f"{_NAMESPACE}::{name}", fake, lib=_library)
    _ops["cuda"].append(name)
    if cpu is not None:
        _library.impl(name, cpu, "CPU")
        _ops["cpu"].append(name)


def is_built(device_type: str) -> bool:
    """Whether this build has the ops for a "cpu" or "cuda", whatever the machine has."""
    return device_type in _DISPATCH_KEYS and not missing_ops(device_type)


def missing_ops(device_type: str) -> list[str]:
    """Name the ops, as in qoq::w4a8_gemm, that this build does not have for a "cpu" or "cuda"."""
    key = _DISPATCH_KEYS[device_type]
    names = [f"{_NAMESPACE}::{name}" for name in _ops[device_type]]
    return [n for n in names if not torch._C._dispatch_has_kernel_for_dispatch_key(n, key)]


def has_kernels(device_type: str) -> bool:
    """Whether this build computes the ops on this machine's "cpu" or "cuda"."""
    if not is_built(device_type):
        return False
    return device_type != "cuda" or (torch.cuda.is_available() and _problem() is None)


def missing_kernels() -> str:
    """Say why `has_kernels("cuda")` is false here and what to do: the end of a refusal."""
    if torch.cuda.is_available():
        return str(_problem() or kernel_library.NO_LIBRARY)
    lacking = missing_ops("cuda")
    # A build of torch for CPUs loads no library, so that nothing is known of its ops.
    if torch.version.cuda and lacking and kernel_library.built_for() is not None:
        return str(kernel_library.without(lacking))
    return str(kernel_library.NO_LIBRARY)


def _problem() -> kernel_library.Problem | None:
    gpu, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    beside = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return kernel_library.problem_of(
        gpu, capability, kernel_library.built_for(), missing_ops("cuda"), beside
    )


# The library links torch's CUDA libraries, which a CPU build of torch does not have.
if kernel_library.PATH.is_file() and torch.version.cuda is not None:
    try:
        torch.ops.load_library(kernel_library.PATH)
    except OSError as error:
        raise OSError(kernel_library.unloadable(error, torch.version.cuda)) from error
