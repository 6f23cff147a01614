"""Timing of calls on the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

# As many rounds over all calls are made as fit into the time, within these bounds.
_SECONDS = 0.1
_FEWEST, _MOST = 3, 50
# A round that takes this long has been measured well enough by itself.
_LONG_SECONDS = 0.5


def host_seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Measure the seconds of one call: the median over rounds of all `calls` in order."""
    calls[0]()  # may prepare something
    rounds = [_round(calls)]
    while sum(rounds) < _SECONDS or len(rounds) < _FEWEST:
        if len(rounds) == _MOST or rounds[0] > _LONG_SECONDS:
            break
        rounds.append(_round(calls))
    return statistics.median(rounds) / len(calls)


def _round(calls: Sequence[Callable[[], object]]) -> float:
    started = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - started
