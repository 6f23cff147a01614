"""What is written down of a server as soon as it is measured."""

from __future__ import annotations

from typing import Any

from vllm_qoq.bench.serving.cases import Lengths
from vllm_qoq.bench.serving.online.load import Load
from vllm_qoq.bench.serving.records import Record, Seconds

Case = tuple[Lengths, float, int, tuple[tuple[str, float], ...]]
"""What is asked at a rate: lengths, requests a second, requests, and the objective."""


class Asked(Record):
    """A server.

    model        folder with a `config.json` and a tokenizer
    engine_args  arguments of vLLM's engine, as `LLM()` takes them
    fingerprint  digest of all that a result depends on, but for the load
    """

    model: str
    engine_args: dict[str, Any]
    fingerprint: str


class Measured(Record):
    """The answers to the requests of one rate.

    rate               requests a second that were sent
    requests           how many were sent, all of which were answered
    objective          name of `load.PARTS` -> milliseconds
    seconds            from the first request to the last token
    good               the requests that met the objective
    ttft_ms            time to first token, the median
    tpot_ms            time per output token after it, the median
    tokens_per_second  new tokens over `seconds`
    """

    prompt: int
    new: int
    rate: float
    requests: int
    objective: dict[str, float]
    seconds: Seconds
    good: int
    ttft_ms: float
    ttft_p99_ms: float
    tpot_ms: float
    tpot_p99_ms: float
    tokens_per_second: float

    @property
    def case(self) -> Case:
        """What was asked."""
        objective = tuple(sorted(self.objective.items()))
        return Lengths(self.prompt, self.new), self.rate, self.requests, objective

    @property
    def goodput(self) -> float:
        """The requests a second that met the objective."""
        return self.good / self.seconds

    @property
    def share(self) -> float:
        """The share of the requests that met the objective."""
        return self.good / self.requests


def case_of(load: Load, rate: float) -> Case:
    """Say what a load asks at a rate."""
    return load.lengths, rate, load.requests(rate), tuple(sorted(load.objective.items()))
