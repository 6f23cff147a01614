"""What vLLM does for every engine, and needs to do once for all engines of a process."""

from __future__ import annotations

import functools

from vllm.platforms import current_platform

_NAME = "register_triton_kernel_overrides"


def kernel_overrides() -> None:
    """Let vLLM look once for the Triton kernels that it has other code for on a CPU.

    It goes through all that every module holds, half a second for each engine, and what it finds
    after the first is in place already.
    """
    register = getattr(current_platform, _NAME, None)  # vLLM 0.26 has none
    if register is not None and not hasattr(register, "cache_info"):
        setattr(current_platform, _NAME, functools.cache(register))
