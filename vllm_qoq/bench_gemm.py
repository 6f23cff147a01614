"""`python -m vllm_qoq.bench_gemm`: microseconds of the W4A8 GEMM beside its floor and a peer.

Every call of a CUDA graph reads other weights, more than the L2 holds in all; the time is the
median of its replays. The floor is max(bytes / copy bandwidth, operations / 1932 TOPS), both
measured on one H200.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable

import torch

from vllm_qoq import ops, w4a8_layout

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # Llama-3-8B
TOKENS = (1, 16, 32, 64, 128, 256, 512, 1024, 4096)
COPY_BANDWIDTH = 4.28e12  # bytes read and written a second
INT8_RATE = 1932e12
BYTES_OF_WEIGHTS = 300e6
REPLAYS = 30

Call = Callable[[], torch.Tensor]


def microseconds(calls: list[Call]) -> float:
    """Of one call, in a graph of all."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    del graph, outputs
    return statistics.median(times)


def floor_microseconds(m: int, n: int, k: int, bits: float = 4.125) -> float:
    """What no kernel on this card undercuts."""
    size = n * k * bits / 8 + m * k + 2 * m * n
    return 1e6 * max(size / COPY_BANDWIDTH, 2 * m * n * k / INT8_RATE)


def w4a8(m: int, n: int, k: int, is_grouped: bool) -> list[Call]:
    """Our kernel with random weights."""
    copies = max(2, min(24, math.ceil(BYTES_OF_WEIGHTS / (n * k / 2))))
    shape = (-(-n // w4a8_layout.BLOCK_N), k // w4a8_layout.BLOCK_K)
    size = w4a8_layout.packed_bytes(is_grouped)
    weights = [
        torch.randint(0, 256, (*shape, size), dtype=torch.uint8, device="cuda")
        for _ in range(copies)
    ]
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device="cuda")
    x_scale, row_sum = torch.rand(m, device="cuda"), x.sum(1, dtype=torch.int32)
    scale = torch.rand(n, device="cuda")
    zero = None if is_grouped else torch.rand(n, device="cuda")
    scratch = ops.workspace(x.device)

    def call(weight: torch.Tensor) -> torch.Tensor:
        return torch.ops.qoq.w4a8_gemm(
            *(x, x_scale, row_sum, weight, scale, zero, None, None, None),
            *(torch.bfloat16, scratch),
        )

    return [lambda w=w: call(w) for w in weights]  # type: ignore[misc]


def bf16(m: int, n: int, k: int) -> list[Call]:
    """cuBLAS in bf16."""
    copies = max(2, min(24, math.ceil(BYTES_OF_WEIGHTS / (n * k * 2))))
    weights = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]  # type: ignore[misc]


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    head = "     N      K      M |  g128 us  TB/s  TOPS floor | per-channel us  floor | bf16 us"
    print(head)
    for n, k in SHAPES:
        for m in arguments.tokens:
            floor = floor_microseconds(m, n, k)
            grouped = microseconds(w4a8(m, n, k, True))
            channel = microseconds(w4a8(m, n, k, False))
            plain = microseconds(bf16(m, n, k))
            print(
                f"{n:6d} {k:6d} {m:6d} | {grouped:8.1f} {n * k * 0.516 / grouped / 1e6:5.2f} "
                f"{2 * m * n * k / grouped / 1e6:5.0f} {floor / grouped:5.0%} | "
                f"{channel:14.1f} {floor_microseconds(m, n, k, 4) / channel:6.0%} | {plain:7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
