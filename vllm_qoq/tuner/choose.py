"""The choice of a routing from measurements: a pure function that always has a result.

At every measured size the most accurate set is taken that is at most so much slower than the
fastest one as `vllm_qoq.tuner.preferences` allows. So a greater preference for accuracy never
takes a less accurate set. Between two measured batch sizes with different sets, the smaller one
is the last of its row.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from vllm_qoq.routing.table import DecodeRow, LayerRule, Load, Routing
from vllm_qoq.tuner.measurements import Estimates
from vllm_qoq.tuner.preferences import SLOWER, Preference


def choose(
    estimates: Estimates,
    order: Sequence[str],
    prefer: Preference,
    layers: Sequence[LayerRule] = (),
    load: Load | None = None,
) -> Routing:
    """Choose the routing for all layers.

    order   the sets, the most accurate first
    prefer  a key of `SLOWER`
    layers  layer rules that the routing keeps
    load    the part for a busy engine, which the routing keeps; the sets of a calm one are chosen
    """
    slower = SLOWER[prefer]
    chosen = {batch: _pick(row, order, slower) for batch, row in sorted(estimates.decode.items())}
    return Routing(
        prefill=_pick(estimates.prefill_per_token(), order, slower),
        decode=_rows(chosen),
        layers=tuple(layers),
        load=load,
    )


def fastest(estimates: Estimates, order: Sequence[str]) -> tuple[DecodeRow, ...]:
    """The decode rows of the fastest sets, whatever their accuracy."""
    return _rows({batch: _pick(row, order, 0) for batch, row in sorted(estimates.decode.items())})


def _pick(seconds: Mapping[str, float], order: Sequence[str], slower: float) -> str:
    limit = min(seconds.values()) * (1 + slower)
    return next(name for name in order if seconds[name] <= limit)


def _rows(chosen: Mapping[int, str]) -> tuple[DecodeRow, ...]:
    """Make decode rows of batch size -> set, ascending: as few as say the same at these sizes."""
    batches = list(chosen)
    ends = [
        batch
        for batch, following in itertools.pairwise(batches)
        if chosen[batch] != chosen[following]
    ]
    rows = [DecodeRow(max_batch=batch, set_name=chosen[batch]) for batch in ends]
    return (*rows, DecodeRow(set_name=chosen[batches[-1]]))
