"""The cases and kernels of `bench gemm`, without imports, for --help and the tests."""

from __future__ import annotations

from typing import NamedTuple

LAYERS = ("qkv", "o", "gate_up", "down")
# The sizes (N, K) of LAYERS: output channels and inputs on one GPU.
SHAPES = {
    "llama-3-8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "llama-3-70b-tp8": [(1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584)],
    "qwen2.5-7b": [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)],
    "qwen3-32b-tp4": [(2560, 5120), (5120, 2048), (12800, 5120), (5120, 6400)],
}
# The kernels are tested with no token, one, numbers around the edges of tiles, and many.
TOKENS = [0, 1, 3, 16, 17, 64, 100, 128, 257, 1024, 4096]
# They are timed with these, unless --tokens says otherwise.
TIMED_TOKENS = (1, 16, 32, 64, 128, 256, 512, 1024, 4096)

# Our kernels, and the bits of a weight with its group's scale and offset. The nested one is W8A8
# and reads the planes of both sets.
OURS = {
    "qoq-g128": 4.125,
    "qoq-g64": 4.25,
    "qoq-g32": 4.5,
    "qoq-channel": 4.0,
    "qoq-nested": 8.125,
}
# The kernels they are compared with, and the bits of an input.
PEERS = {
    "cublas-bf16": 16,
    "cutlass-int8": 8,
    "cutlass-fp8": 8,
    "marlin-w4a16": 16,
    "marlin-w4a8-int8": 8,
    "machete-w4a16": 16,
    "cutlass-w4a8-fp8": 8,
    "humming-g128": 8,
    "humming-channel": 8,
}
KERNELS = (*OURS, *PEERS)


class Case(NamedTuple):
    """A product that is measured: x [M, K] times the weight [N, K] of a layer."""

    layer: str
    n: int
    k: int
    m: int
