"""The int8 rate of the tensor cores that the W4A8 GEMM of this library uses."""

from __future__ import annotations

import statistics

import torch
from torch.library import Library

from vllm_qoq import cards, kernel_library
from vllm_qoq.bench.roofline import WGMMA, Int8Rate
from vllm_qoq.measuring import gpu as timing

_MMA = "mma.sync u8.s8, measured in this run"

# Only here the op has a schema, so that nothing else can call it.
_library = Library("qoq", "FRAGMENT")
_library.define("mma_int8_operations(Tensor(a!) out) -> int")
_LAUNCHES = 5


def int8_rate() -> Int8Rate:
    """Measure operations a second of mma.sync; where the Hopper path runs, give those of wgmma."""
    capability = torch.cuda.get_device_capability()
    if cards.gemm_path(capability, kernel_library.built_for() or ()) == "hopper":
        return WGMMA
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    operations = torch.ops.qoq.mma_int8_operations(out)
    seconds = timing.intervals(lambda: torch.ops.qoq.mma_int8_operations(out), _LAUNCHES)
    return Int8Rate(operations / statistics.median(seconds), _MMA)
