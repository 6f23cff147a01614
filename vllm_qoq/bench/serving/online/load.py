"""The load of `bench serving --online`: which requests come, how fast, and what users expect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_qoq.bench import BenchError
from vllm_qoq.bench.serving.cases import Lengths

RATES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Requests a second, unless the user says otherwise."""
SECONDS = 30.0
"""The seconds of arrivals at each rate, unless the user says otherwise."""
FEWEST = 30
"""The least requests at each rate, unless the user says otherwise."""
OBJECTIVE = {"ttft": 500.0, "tpot": 25.0}
"""Milliseconds that a good request takes at most, unless the user says otherwise."""
PARTS = {
    "ttft": "the first token within {} ms",
    "tpot": "{} ms for each token after it",
    "e2el": "the whole answer within {} ms",
}
"""Name of a part of the objective, as in vLLM -> what it means."""


@dataclass(frozen=True)
class Load:
    """The requests that every server gets.

    rates      requests a second, ascending
    seconds    how long requests come at each rate
    fewest     the least requests at each rate
    objective  name of PARTS -> the most milliseconds of a good request
    """

    lengths: Lengths
    rates: tuple[float, ...] = RATES
    seconds: float = SECONDS
    fewest: int = FEWEST
    objective: Mapping[str, float] = field(default_factory=lambda: dict(OBJECTIVE))

    def requests(self, rate: float) -> int:
        """Compute the number of requests at a rate."""
        return max(self.fewest, round(rate * self.seconds))


def check_lengths(lengths: tuple[Lengths, ...]) -> Lengths:
    """Raise BenchError unless there is one pair of lengths, with time between two tokens."""
    if len(lengths) != 1:
        raise BenchError(
            f"--lengths {','.join(map(str, lengths))}: --online measures one pair of lengths in a "
            "run; choose one"
        )
    if lengths[0].new < 2:
        raise BenchError(
            f"--lengths {lengths[0]}: an answer of one token has no time per output token; give "
            "answers of two or more"
        )
    return lengths[0]


def in_words(objective: Mapping[str, float]) -> str:
    """Say what a request has to do to be a good one."""
    return ", ".join(PARTS[name].format(f"{most:g}") for name, most in objective.items())


def as_option(objective: Mapping[str, float]) -> str:
    """Write an objective as the command line takes it: ttft:500,tpot:25."""
    return ",".join(f"{name}:{most:g}" for name, most in objective.items())
