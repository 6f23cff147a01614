"""The counters of steps by phase and set: a step counts itself, and any process reads them.

The counters are a file of int64 [phases, sets] in shared memory. The worker
maps it; on CUDA the GPU sees the same memory, and the count is an in-place add
that a CUDA graph captures with the rest of the step. So a replayed graph, which
never enters Python, counts itself, and the front end reads the result without
asking the worker. Only the first rank of an engine counts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from vllm_qoq.routing.table import Phase
from vllm_qoq.serving.vllm_versions import device_view


def counter_file(stem: str, engine: int) -> Path:
    """Name the file of one engine core's counters, by its data-parallel index."""
    return Path(f"{stem}-{engine}")


class StepCounters:
    """The writing end, of which only `add` is on the hot path."""

    def __init__(self, path: Path, sets: tuple[str, ...], device: torch.device) -> None:
        # The file has its full size before it is mapped, because a short one would fault on access.
        path.write_bytes(bytes(8 * len(Phase) * len(sets)))
        counts = torch.from_file(
            str(path), shared=True, size=len(Phase) * len(sets), dtype=torch.int64
        )
        self._host = counts  # owns the mapping
        if device.type == "cuda":
            counts = device_view(counts)
        self._cells = {
            (phase, name): counts[phase * len(sets) + column]
            for phase in Phase
            for column, name in enumerate(sets)
        }

    def add(self, phase: Phase, set_name: str, steps: int | torch.Tensor = 1) -> None:
        """Count `steps` (an integer, or one on the device) in the order of the current stream."""
        self._cells[phase, set_name].add_(steps)


class CounterReader:
    """The reading end, for any process on the same host."""

    def __init__(self, path: Path, sets: tuple[str, ...]) -> None:
        self._path, self._sets = path, sets

    def is_elsewhere(self) -> bool:
        """Whether an engine whose model is loaded counts on another host, as its first rank may."""
        return bool(self._sets) and not self._path.exists()

    def read(self) -> dict[tuple[str, str], int]:
        """Read the steps so far by (phase, set), all zero before the model is loaded."""
        shape = (len(Phase), len(self._sets))
        try:
            counts = np.fromfile(self._path, dtype=np.int64).reshape(shape)
        except FileNotFoundError:
            counts = np.zeros(shape, dtype=np.int64)
        return {
            (phase.name.lower(), name): int(counts[phase, column])
            for phase in Phase
            for column, name in enumerate(self._sets)
        }
