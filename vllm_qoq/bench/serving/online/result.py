"""The result of `bench serving --online`, and what follows from it, without vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_qoq.bench.serving.formats import Format
from vllm_qoq.bench.serving.online.load import Load
from vllm_qoq.bench.serving.online.records import Measured

ENOUGH = 0.9
"""The share of requests that meet the objective at a rate that a server is said to hold."""


@dataclass(frozen=True)
class Served:
    """What was measured of a format or a checkpoint.

    format       None for a checkpoint
    weights_gib  GiB that loading the weights took, by vLLM's log; None where it does not say
    left_out     why rates are missing; None where none are
    """

    name: str
    is_ours: bool
    format: Format | None
    weights_gib: float | None
    measured: tuple[Measured, ...]
    left_out: str | None

    @property
    def by_rate(self) -> dict[float, Measured]:
        """What was measured at each rate, in ascending order."""
        return {one.rate: one for one in sorted(self.measured, key=lambda one: one.rate)}

    @property
    def held_rate(self) -> float | None:
        """The highest rate up to which ENOUGH requests meet the objective, at all rates below, too.

        0 where they do at no rate; None where nothing was measured.
        """
        if not self.measured:
            return None
        held = 0.0
        for rate, one in self.by_rate.items():
            if one.share < ENOUGH:
                break
            held = rate
        return held

    @property
    def holds_all(self) -> bool:
        """Whether the held rate is the highest that was measured, so that it may hold more."""
        return bool(self.held_rate) and self.held_rate == max(self.by_rate)

    @property
    def goodput(self) -> float:
        """The highest goodput of all rates; 0 where nothing was measured."""
        return self.goodput_at(self.by_rate)

    def goodput_at(self, rates: Iterable[float]) -> float:
        """Find the highest goodput of some of the rates; 0 where none was measured."""
        found = self.by_rate
        return max((found[rate].goodput for rate in rates if rate in found), default=0.0)


@dataclass(frozen=True)
class Online:
    """The result of one run.

    model        name of a shape or folder; None where only checkpoints were measured
    device       name of the card
    environment  the result of `vllm_qoq.environment.describe`
    engine_args  what the user gave for all engines
    """

    model: str | None
    device: str
    environment: Mapping[str, Any]
    load: Load
    engine_args: Mapping[str, Any]
    servers: tuple[Served, ...]

    def best(self, is_ours: bool) -> Served | None:
        """Find the server, of ours or of vLLM's own formats, that holds the highest rate.

        Among equals it is the one with the highest goodput. None where nothing was measured.
        """
        found = [one for one in self.servers if one.is_ours == is_ours and one.measured]
        return max(found, key=lambda one: (one.held_rate or 0, one.goodput), default=None)

    @property
    def goodput_ratio(self) -> float | None:
        """The highest goodput of our best over that of vLLM's best; None where one has none.

        Only rates count at which both were measured, since one may have been stopped early.
        """
        ours, peer = self.best(is_ours=True), self.best(is_ours=False)
        if ours is None or peer is None:
            return None
        both = ours.by_rate.keys() & peer.by_rate.keys()
        least = peer.goodput_at(both)
        return ours.goodput_at(both) / least if least else None


def to_json(result: Online) -> dict[str, Any]:
    """Make the document of --json and online.json; null for what is not known."""
    load, ours, peer = result.load, result.best(is_ours=True), result.best(is_ours=False)
    return {
        "benchmark": "online",
        "model": result.model,
        "device": result.device,
        "environment": dict(result.environment),
        "lengths": str(load.lengths),
        "rates": list(load.rates),
        "seconds": load.seconds,
        "fewest": load.fewest,
        "objective_ms": dict(load.objective),
        "enough": ENOUGH,
        "engine_args": dict(result.engine_args),
        "servers": [_server(one) for one in result.servers],
        "best_of_ours": ours and ours.name,
        "best_peer": peer and peer.name,
        "goodput_against_the_best_peer": result.goodput_ratio,
    }


def _server(server: Served) -> dict[str, Any]:
    return {
        "name": server.name,
        "is_ours": server.is_ours,
        "weights_gib": server.weights_gib,
        "held_rate": server.held_rate,
        "left_out": server.left_out,
        "rates": [
            {**one.model_dump(), "goodput": one.goodput, "share": one.share}
            for one in server.by_rate.values()
        ],
    }
