"""The preferences of users: how much time accuracy is worth.

At every measured size the most accurate set is taken that is at most so much slower than the
fastest one:

    prefer     slower by at most   why
    accuracy   25 %                what a user may notice is worth more than the GPU's time
    balanced    5 %                a smaller gain is lost in attention, norms and sampling
    speed       2 %                measurements differ as much by chance; a tie
"""

from __future__ import annotations

from typing import Literal

from vllm_qoq.tuner import TuneError

Preference = Literal["accuracy", "balanced", "speed"]

SLOWER: dict[Preference, float] = {"accuracy": 0.25, "balanced": 0.05, "speed": 0.02}
"""Preference -> how much slower than the fastest set a more accurate one may be."""

DEFAULT: Preference = "balanced"

MAX_BATCH = 256
"""The largest decode step that is measured, unless the user says otherwise."""
_LARGEST_BATCH = 1024


def check_max_batch(max_batch: int) -> None:
    """Raise TuneError for a decode step that is too large to be measured."""
    if max_batch > _LARGEST_BATCH:
        raise TuneError(f"--max-batch {max_batch}: is larger than {_LARGEST_BATCH}")
