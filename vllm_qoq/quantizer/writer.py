"""Writing the pieces of a work folder while the next one is computed."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from vllm_qoq.quantizer.workdir import WorkDir


class PieceWriter:
    """A writer of pieces in a thread of its own, one at a time.

    An error of a write is raised by the next call of `save` or `close`.
    """

    def __init__(self, work: WorkDir) -> None:
        self._work = work
        self._pool = ThreadPoolExecutor(1, "vllm-qoq-writer")
        self._pending: Future[None] | None = None

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], facts: object) -> None:
        """Begin to store a piece, when the one before is stored; `tensors` must stay as they are.

        They are copied from a GPU here, so that no other piece is held than the one being written.
        """
        self._wait()
        on_cpu = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
        self._pending = self._pool.submit(self._work.save, name, on_cpu, facts)

    def close(self) -> None:
        """Wait until everything is stored."""
        try:
            self._wait()
        finally:
            self._pool.shutdown()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
