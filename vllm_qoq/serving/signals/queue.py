"""The signal that an engine is busy, which its front end writes and its steps read.

The signal is a file of int32 [is_calm, is_busy] in shared memory, one per engine. The front end
of a server sees after every step how many requests wait (`plugin.metrics`); when that makes the
engine busy or calm (`vllm_qoq.routing.hysteresis`) it writes the file, and every rank of the engine
reads it once per forward pass:

* on the host, where no CUDA graph freezes what a step does,
* otherwise on the device, by a copy that the graph captures with the step, so that every replay
  reads anew. Both sets are then one GEMM, which reads its flag from the copy.

Two ranks may read a switch one step apart. In that step their slices of a layer are in different
precisions; each is right in its own, so the sum over the ranks still approximates the layer.

An engine that runs dry by aborts alone takes no step more, so nobody says how long its queue is.
It stays busy until the next step has ended.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_qoq.routing.hysteresis import Hysteresis
from vllm_qoq.routing.table import Load, RoutingError
from vllm_qoq.serving.options import NAMESPACE
from vllm_qoq.serving.vllm_versions import api_process_count, device_view

logger = init_logger("vllm." + __name__)

# These are both words of the file as one int64, which is read and written whole.
_CALM, _BUSY = (int(np.array(flags, np.int32).view(np.int64)[0]) for flags in ((1, 0), (0, 1)))

_REMEDY = (
    f'{{"{NAMESPACE}": {{"force_load": "calm"}}}} in --additional-config keeps the engine in one '
    "state"
)

_is_writer_here = False


def announce_writer() -> None:
    """Say that this process will make a `LoadWriter` for the engines that it starts."""
    global _is_writer_here
    _is_writer_here = True


def is_writer_here() -> bool:
    """Whether this process, or the one that it was forked from, will make a `LoadWriter`."""
    return _is_writer_here


def load_file(stem: str, engine: int) -> Path:
    """Name the file of one engine core's signal, which is beside its counters."""
    return Path(f"{stem}-{engine}-load")


def check_engine(vllm_config: VllmConfig, has_writer: bool) -> None:
    """Raise RoutingError where nobody would see the queue, or not all ranks the signal."""
    parallel = vllm_config.parallel_config
    if (count := api_process_count(parallel)) > 1:
        raise RoutingError(
            f"routing.load: {count} API processes, and none of them sees the whole queue; start "
            f"with --api-server-count 1, or {_REMEDY}"
        )
    if parallel.nnodes > 1 or parallel.distributed_executor_backend == "ray":
        where = f"--nnodes {parallel.nnodes}" if parallel.nnodes > 1 else "the Ray executor"
        raise RoutingError(
            f"routing.load: {where} may put ranks on several hosts, which share no memory; keep "
            f"an engine on one host with --distributed-executor-backend mp, or {_REMEDY}"
        )
    if not has_writer:
        raise RoutingError(
            "routing.load: only the Python front end of `vllm serve` tells how many requests "
            f"wait, and this engine has another, for example LLM(); {_REMEDY}"
        )


class LoadReader:
    """The reading end, in each rank of an engine.

    is_calm, is_busy  int32 [1] on the device: the one that held when `copy` last ran is 1
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        _create(path)
        words = torch.from_file(str(path), shared=True, size=1, dtype=torch.int64)
        self._host = words.view(torch.int32).numpy()  # owns the mapping
        self._words = device_view(words) if device.type == "cuda" else words
        self._copy = torch.full((1,), _CALM, dtype=torch.int64, device=device)
        self._steps = torch.zeros(1, dtype=torch.int64, device=device)
        self.is_calm, self.is_busy = self._copy.view(torch.int32).split(1)

    def read(self) -> bool:
        """Whether the engine is busy now, on the host."""
        return bool(self._host[1])

    def copy(self) -> None:
        """Bring the state to the device, in the order of the current stream.

        A GEMM is launched with programmatic dependent launch: it may start before the kernel
        right ahead of it has ended, and reads its flag at once. So a plain kernel that does not
        launch its dependents early has to stand between, and the copy has to be enqueued first.
        The step counter's add would be one, but not every rank counts, nor every step.
        """
        # An addition is a kernel, which writes the word whole; a copy engine might do the copy.
        torch.add(self._words, 0, out=self._copy)
        self._steps.add_(1)


class LoadWriter:
    """The writing end, in the front end, which turns the length of a queue into the signal."""

    def __init__(self, path: Path, load: Load, engine: str) -> None:
        """Open the file; RoutingError where it is missing, as the engine is on another host."""
        self._hysteresis = Hysteresis(load.enter, load.leave)
        self._engine = engine
        self.switches = 0
        try:
            self._words = np.memmap(path, np.int64, "r+", shape=(1,))
        except FileNotFoundError:
            raise RoutingError(
                f"routing.load: engine {engine} shares no memory with this process; run both on "
                f"one host, or {_REMEDY}"
            ) from None
        self._words[0] = _CALM

    @property
    def is_busy(self) -> bool:
        """Whether the signal says that the engine is busy."""
        return self._hysteresis.is_busy

    def update(self, waiting: int) -> None:
        """Take notice that `waiting` requests wait for room in a step; write only a switch."""
        before = self._hysteresis.is_busy
        if self._hysteresis.update(waiting) == before:
            return
        self._words[0] = _BUSY if self.is_busy else _CALM
        self.switches += 1
        state = "busy" if self.is_busy else "calm"
        logger.info("Engine %s is %s now: %d requests wait", self._engine, state, waiting)


def _create(path: Path) -> None:
    """Make the file, calm and with its full size, unless another rank was first."""
    whole = Path(f"{path}-{os.getpid()}")
    whole.write_bytes(np.int64(_CALM).tobytes())
    try:
        os.link(whole, path)
    except FileExistsError:
        pass
    finally:
        whole.unlink()
