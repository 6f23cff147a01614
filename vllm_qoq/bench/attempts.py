"""Running of other people's kernels: what fails is left out, by name and with the reason."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import TypeVar

import torch

from vllm_qoq.bench import BenchError
from vllm_qoq.bench.cases import KERNELS, OURS
from vllm_qoq.bench.result import LeftOut
from vllm_qoq.progress import say

_T = TypeVar("_T")
EVERYWHERE = "everywhere"
_LONGEST_REASON = 200


class Attempts:
    """A record of what was left out; a reason is printed on stderr the first time."""

    def __init__(self, ours: Container[str] = OURS, kernels: Iterable[str] = KERNELS) -> None:
        self._ours, self._kernels = ours, tuple(kernels)
        self.left_out: list[LeftOut] = []
        self.absent: set[str] = set()  # kernels that are not installed

    def run(self, kernel: str, where: str, work: Callable[[], _T]) -> _T | None:
        """Do `work` with a kernel; the result is None where a peer refuses.

        A failure of our own kernel is a bug and is raised. Raises BenchError where a peer broke the
        CUDA context.
        """
        try:
            return work()
        except Exception as error:
            if kernel in self._ours:
                raise
            if isinstance(error, ImportError):
                self.absent.add(kernel)
                where = EVERYWHERE
            found = LeftOut(kernel, where, _reason(error))
        # The error is gone, and with it the frames that held the GPU's memory.
        if all((one.kernel, one.reason) != (kernel, found.reason) for one in self.left_out):
            say(f"left out: {found}")
        self.left_out.append(found)
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            others = ",".join(name for name in self._kernels if name != kernel)
            raise BenchError(
                f"{found}. That broke the CUDA context, so nothing can be measured after it; "
                f"leave the kernel out: --kernels {others}"
            ) from error
        return None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:_LONGEST_REASON]}"
