"""The floor that no kernel on this GPU undercuts: its memory, or its tensor cores."""

from __future__ import annotations

from vllm_qoq.bench.cases import OURS, Case

# Dense operations a second of wgmma u8.s8, with random operands in registers and shared memory, as
# measured on one NVIDIA H200 (1931 to 1934 TOPS), not in the run that is reported.
INT8_RATE = 1932e12


def operations(case: Case) -> int:
    """Count the operations: a multiplication and an addition per weight and token."""
    return 2 * case.m * case.n * case.k


def bytes_moved(case: Case, weight_bits: float) -> float:
    """Count the bytes of weights, int8 inputs and 16-bit outputs, each once."""
    return case.n * case.k * weight_bits / 8 + case.m * case.k + 2 * case.m * case.n


def floor_seconds(kernel: str, case: Case, copy_rate: float) -> float:
    """Compute the least seconds of one of our kernels at `copy_rate` bytes a second, both ways."""
    memory = bytes_moved(case, OURS[kernel]) / copy_rate
    return max(memory, operations(case) / INT8_RATE)
