"""The floor that no kernel on this GPU undercuts: its memory, or its tensor cores."""

from __future__ import annotations

from vllm_qoq.bench.cases import OURS, Case

# Operations a second, dense, of wgmma u8.s8 with random operands in registers and shared memory:
# measured on one NVIDIA H200 (1931 to 1934 TOPS), not in this run.
INT8_RATE = 1932e12


def operations(case: Case) -> int:
    """A multiplication and an addition per weight and token."""
    return 2 * case.m * case.n * case.k


def bytes_moved(case: Case, weight_bits: float) -> float:
    """Weights, int8 inputs and 16-bit outputs, each once."""
    return case.n * case.k * weight_bits / 8 + case.m * case.k + 2 * case.m * case.n


def floor_seconds(kernel: str, case: Case, copy_rate: float) -> float:
    """Of one of our kernels, where memory moves copy_rate bytes a second, read plus written."""
    memory = bytes_moved(case, OURS[kernel]) / copy_rate
    return max(memory, operations(case) / INT8_RATE)
