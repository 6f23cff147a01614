"""Timing of calls on the GPU."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch

Call = Callable[[], torch.Tensor]

COPY_BYTES = 2 << 30
_COPIES = 10
# A graph is replayed 20 times, or as often as fits into the time, but at least 3 times.
_REPLAYS, _FEWEST_REPLAYS = 20, 3
_SECONDS = 0.15
# A graph of few short calls would measure its own launch: such calls are repeated in it.
_CALLS = 12
_SHORT_SECONDS = 2e-3


def seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Measure the seconds of one call: the median over replays of a CUDA graph of all `calls`.

    calls  read different weights, more than the L2 holds in all, so that each finds its own
           weights in memory. They are made in order; inputs may be shared.

    What the calls return is kept until the graph is complete, so that each writes to memory of
    its own.
    """
    rounds = _rounds(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for _ in range(rounds) for call in calls]
    warm = intervals(graph.replay, 2)[-1]
    replays = max(_FEWEST_REPLAYS, min(_REPLAYS, int(_SECONDS / warm)))
    return statistics.median(intervals(graph.replay, replays)) / len(outputs)


def copy_rate() -> float:
    """Measure the bytes a second, read plus written, of a copy of 2 GiB within the GPU's memory."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = intervals(partial(target.copy_, source), _COPIES)
    return 2 * COPY_BYTES / statistics.median(times)


def _rounds(calls: Sequence[Callable[[], object]]) -> int:
    """Decide how often a graph holds each call, and warm up, off the stream that is captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # may compile
        once = intervals(lambda: [call() for call in calls], 1)[0]
    torch.cuda.synchronize()
    return math.ceil(_CALLS / len(calls)) if once < _SHORT_SECONDS else 1


def intervals(launch: Callable[[], object], count: int) -> list[float]:
    """Measure the seconds of each of `count` launches, queued without a gap.

    The first may have waited for the CPU, which a median does not see.
    """
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        launch()
        event.record()
    events[-1].synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(events)]
