"""The result of `bench gemm`, and what follows from it, without a GPU or torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_qoq.bench.cases import LAYERS, OURS, PEERS, SHAPES, Case
from vllm_qoq.bench.roofline import Int8Rate, bytes_moved, floor_seconds, operations

# The kernel that the summary is about, the nested one, and the peers with 8-bit inputs like theirs.
SUBJECT = "qoq-g128"
NESTED = "qoq-nested"
RIVALS = tuple(name for name, input_bits in PEERS.items() if input_bits == 8)


@dataclass(frozen=True)
class LeftOut:
    """A kernel that could not be measured: where, and why."""

    kernel: str
    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kernel}, {self.where}: {self.reason}"


@dataclass(frozen=True)
class Result:
    """The result of one run.

    environment  the result of `vllm_qoq.environment.describe`, with what the peers add
    copy_rate    bytes a second of a copy, read plus written
    int8_rate    of the tensor cores that our kernels use
    seconds      seconds of a call, by case and kernel; a kernel that was left out is absent
    """

    model: str
    device: str
    environment: Mapping[str, Any]
    copy_rate: float
    int8_rate: Int8Rate
    tokens: tuple[int, ...]
    kernels: tuple[str, ...]
    seconds: Mapping[Case, Mapping[str, float]]
    left_out: tuple[LeftOut, ...]

    def cases(self, m: int) -> list[Case]:
        """List the model's layers at m tokens."""
        shapes = zip(LAYERS, SHAPES[self.model], strict=True)
        return [Case(layer, n, k, m) for layer, (n, k) in shapes]

    def best_rival(self, case: Case) -> float | None:
        """Find the seconds of the fastest peer of our kind; None if there is none."""
        times = self.seconds[case]
        return min((times[name] for name in RIVALS if name in times), default=None)

    def share_of_floor(self, kernel: str, case: Case) -> float | None:
        """Compare one of our kernels with the floor: 1 is as fast as this GPU can be."""
        measured = self.seconds[case].get(kernel)
        return measured and self.floor_seconds(kernel, case) / measured

    def floor_seconds(self, kernel: str, case: Case) -> float:
        """Compute the least seconds of one of our kernels at the rates of this result."""
        return floor_seconds(kernel, case, self.copy_rate, self.int8_rate.operations)


def speedups(result: Result) -> dict[str, list[float | None]]:
    """Divide the peers' times by ours: label -> a geometric mean over all layers for each M.

    Ours is SUBJECT, or NESTED where the label says so. A mean is None where any layer lacks either
    of the two.
    """

    def of(name: str) -> Callable[[Case], float | None]:
        return lambda case: result.seconds[case].get(name)

    pairs = {
        "best W4A8 or W8A8 peer": (result.best_rival, SUBJECT),
        "cutlass-int8": (of("cutlass-int8"), SUBJECT),
        "humming-g128": (of("humming-g128"), SUBJECT),
        "marlin-w4a8-int8": (of("marlin-w4a8-int8"), SUBJECT),
        "marlin-w4a16": (of("marlin-w4a16"), SUBJECT),
        f"cutlass-int8 / {NESTED}": (of("cutlass-int8"), NESTED),
    }
    return {
        label: [_speedup(result, m, peer, ours) for m in result.tokens]
        for label, (peer, ours) in pairs.items()
        if ours in result.kernels
    }


def _speedup(
    result: Result, m: int, peer: Callable[[Case], float | None], name: str
) -> float | None:
    cases = result.cases(m)
    theirs, ours = map(peer, cases), (result.seconds[case].get(name) for case in cases)
    ratios = [a / b for a, b in zip(theirs, ours, strict=True) if a and b]
    if len(ratios) < len(cases):
        return None
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))


def to_json(result: Result) -> dict[str, Any]:
    """Make the document of --json and gemm.json: microseconds, null where a kernel was left out."""
    return {
        "benchmark": "gemm",
        "model": result.model,
        "device": result.device,
        "environment": dict(result.environment),
        "copy_bytes_per_second": result.copy_rate,
        "int8_operations_per_second": result.int8_rate.operations,
        "int8_rate_of": result.int8_rate.source,
        "kernels": list(result.kernels),
        "tokens": list(result.tokens),
        "cases": [_case(result, case) for case in result.seconds],
        "speed_against_peers": speedups(result),
        "left_out": [vars(one) for one in result.left_out],
    }


def _case(result: Result, case: Case) -> dict[str, Any]:
    times = result.seconds[case]
    return {
        **case._asdict(),
        "operations": operations(case),
        "microseconds": {
            name: 1e6 * times[name] if name in times else None for name in result.kernels
        },
        "ours": {
            name: {
                "bytes": bytes_moved(case, OURS[name]),
                "floor_microseconds": 1e6 * result.floor_seconds(name, case),
                "share_of_floor": result.share_of_floor(name, case),
            }
            for name in OURS
            if name in times
        },
    }
