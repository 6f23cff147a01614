"""Progress of work that takes long, for a terminal or a log: how far it is, and what is left.

On a terminal a stage is a bar; elsewhere it is a plain line now and then, because a bar redraws
itself with carriage returns, which a log keeps as rubbish. All of it goes to stderr.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_BYTES_SECONDS = 10.0
_PIECES_SECONDS = 5.0


def human_bytes(count: float) -> str:
    """Write a size in powers of 1000, like disks and `--max-shard-size`: 1234567 is "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Write a time for people: 95 is "1 min 35 s"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def say(text: str) -> None:
    """Write a line to stderr; a bar stays below it."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


@contextmanager
def counted(label: str, total: int, quiet: bool) -> Iterator[Callable[[], object]]:
    """Show a stage of `total` pieces; the body calls what it is given after each of them."""
    if quiet or not sys.stderr.isatty():
        yield Clock(label, total, quiet)
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=label) as bar:
        yield bar.update


class Progress:
    """Shows how far a job is that counts bytes, unless it is `quiet`."""

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


class Clock:
    """Prints how long a stage of `total` pieces will still take; call it after each piece."""

    def __init__(self, label: str, total: int, quiet: bool) -> None:
        self._label, self._total, self._quiet = label, total, quiet
        self._started = self._printed = time.monotonic()
        self._done = 0

    def __call__(self) -> None:
        self._done += 1
        now = time.monotonic()
        is_last = self._done == self._total
        if self._quiet or (now - self._printed < _PIECES_SECONDS and not is_last):
            return
        self._printed = now
        left = (now - self._started) / self._done * (self._total - self._done)
        done = f"{self._done} of {self._total}"
        print(f"{self._label}: {done}, about {duration(left)} left", file=sys.stderr, flush=True)


class _Lines:
    """Prints how many bytes of a stage are done."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._next = time.monotonic() + _BYTES_SECONDS

    def advance(self, count: int) -> None:
        self._done += count
        if time.monotonic() < self._next and self._done < self._total:
            return
        self._next = time.monotonic() + _BYTES_SECONDS
        done, total = human_bytes(self._done), human_bytes(self._total)
        print(f"{self._label}: {done} of {total}", file=sys.stderr, flush=True)
