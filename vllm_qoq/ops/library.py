"""The registry in which ops are defined, and the library of CUDA kernels behind them.

Ops are defined in Python, so that they exist, trace and run on the CPU in every build. A build
with VLLM_QOQ_CUDA=1 has `_C.so` in the package, which adds the CUDA kernels; it is loaded where
torch has CUDA, and a library that cannot be loaded is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.library import Library, register_fake

from vllm_qoq.ops import cards

BUILD = "VLLM_QOQ_CUDA=1 pip install --no-build-isolation --no-deps --force-reinstall ."

_NAMESPACE = "qoq"
_CUDA_LIBRARY = Path(__file__).parent.with_name("_C.so")
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
    key = _DISPATCH_KEYS.get(device_type)
    return key is not None and all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"{_NAMESPACE}::{name}", key)
        for name in _ops[device_type]
    )


def has_kernels(device_type: str) -> bool:
    """Whether this build computes the ops on this machine's "cpu" or "cuda"."""
    if not is_built(device_type):
        return False
    return device_type != "cuda" or (
        torch.cuda.is_available() and cards.serves(torch.cuda.get_device_capability())
    )


def missing_kernels() -> str:
    """Say why `has_kernels("cuda")` is false here and what to do: the end of a refusal."""
    if torch.cuda.is_available():
        found = torch.cuda.get_device_capability()
        if not cards.serves(found):
            return (
                f"our kernels are for {cards.needed()}; "
                f"{torch.cuda.get_device_name()} has compute capability {found[0]}.{found[1]}"
            )
    return (
        "this build of vllm-qoq has no CUDA kernels; on an NVIDIA GPU from Ampere on build them in "
        f"a clone, with nvcc: {BUILD} (README, Install)"
    )


# The library links torch's CUDA libraries, which a CPU build of torch does not have.
if _CUDA_LIBRARY.exists() and torch.version.cuda is not None:
    torch.ops.load_library(_CUDA_LIBRARY)
