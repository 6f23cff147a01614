"""How far a stage is and how long the rest will take, in lines that suit a log, too."""

from __future__ import annotations

import sys
import time

_SECONDS_BETWEEN = 5.0


class Clock:
    """Call it after each piece of a stage; prints on stderr unless `quiet`."""

    def __init__(self, label: str, total: int, quiet: bool) -> None:
        self._label, self._total, self._quiet = label, total, quiet
        self._started = self._printed = time.monotonic()
        self._done = 0

    def __call__(self) -> None:
        self._done += 1
        now = time.monotonic()
        is_last = self._done == self._total
        if self._quiet or (now - self._printed < _SECONDS_BETWEEN and not is_last):
            return
        self._printed = now
        left = (now - self._started) / self._done * (self._total - self._done)
        done = f"{self._done} of {self._total}"
        print(f"{self._label}: {done}, about {duration(left)} left", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`95` -> "1 min 35 s"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
