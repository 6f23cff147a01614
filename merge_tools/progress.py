"""Progress on stderr: a bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE_SECONDS = 10.0


def human_bytes(count: float) -> str:
    """`1234567` -> "1.2 MB", in powers of 1000 like disk sizes and `--max-shard-size`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class Progress:
    """Shows how far a job is, unless it is `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Callable[[int], object]]:
        """Show a stage that handles `total` bytes; the body calls what it is given with counts."""
        if self._quiet:
            yield lambda count: None
        elif sys.stderr.isatty():
            from tqdm import tqdm

            with tqdm(total=total, desc=label, unit="B", unit_scale=True, mininterval=0.5) as bar:
                yield bar.update
        else:
            yield _Lines(label, total).advance


class _Lines:
    """tqdm redraws its line with carriage returns, which a log file keeps as rubbish."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._next = time.monotonic() + _LINE_SECONDS

    def advance(self, count: int) -> None:
        self._done += count
        if time.monotonic() < self._next and self._done < self._total:
            return
        self._next = time.monotonic() + _LINE_SECONDS
        done, total = human_bytes(self._done), human_bytes(self._total)
        print(f"{self._label}: {done} of {total}", file=sys.stderr, flush=True)
