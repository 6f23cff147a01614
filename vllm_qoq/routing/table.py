"""The routing table: which weight set a layer uses in a step, as a pure function.

A step is one forward pass of the engine. It is a *decode* step when every
request in it contributes only tokens that it generates (one, or one plus the
speculated ones), and a *prefill* step as soon as one request still reads its
prompt. Mixed steps run whole in the prefill set.

The `routing` object of a checkpoint (`vllm_qoq.checkpoint.format`) or of
`--additional-config '{"qoq": {"routing": ...}}'` reads

    {"prefill": "w8a8",
     "decode": [{"max_batch": 16, "set": "w4a16"}, {"set": "w8a8"}],
     "layers": [{"match": "model.layers.[0-3].*", "decode": "w8a8"}]}

`decode` is searched from the top: the first row whose `max_batch` holds the
batch wins, and the last row has none, so that every batch has an answer.
`layers` overrides either phase for the layers whose name matches a glob; the
first rule that matches a layer wins.

With a `load`, off when absent, other sets serve a busy engine:

    "load": {"enter": 8, "leave": 2, "decode": "w4a8", "prefill": "w4a8"}

It is *busy* from the moment that `enter` requests wait in the scheduler's queue
until no more than `leave` wait, else *calm*. While it is busy, `prefill` and
`decode` of `load`, either or both, stand in the place of the table's. A layer
rule stands above both: its layers stay in what it says for the phase that it
names, however long the queue is.
"""

from __future__ import annotations

import enum
import itertools
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from vllm_qoq.errors import UserError, one_line, shown

MOST_RULES = 4096
"""The most globs in one list: several for each layer of any model, and few enough to try all."""
_BATCH_DIGITS = 9
_BATCH = re.compile(rf"0*[1-9][0-9]{{0,{_BATCH_DIGITS - 1}}}")
_DECODE_FORM = "write [BATCH:]SET,..., for example 16:w4a16,w8a8"


class RoutingError(UserError):
    """An error for a table that is incomplete, out of order, or names what is not there."""


class Phase(enum.IntEnum):
    """The kind of a step; the value is its row in the step counters."""

    PREFILL = 0
    DECODE = 1


@dataclass(frozen=True, slots=True)
class Step:
    """The facts about one forward pass that routing goes by.

    `batch` is the number of requests in a decode step, padded to the size of
    the CUDA graph that replays it. It means nothing in a prefill step. `is_busy`
    is the state of a routing with a `load`: None where it is known on the device
    alone, because a CUDA graph captures the step.
    """

    phase: Phase
    batch: int
    is_busy: bool | None = False


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class DecodeRow(_Table):
    """A row of a decode table: the set for up to `max_batch` requests, any number if None."""

    max_batch: PositiveInt | None = None
    set_name: str = Field(alias="set")


def _one_row(value: object) -> object:
    return [{"set": value}] if isinstance(value, str) else value


DecodeTable = Annotated[tuple[DecodeRow, ...], BeforeValidator(_one_row)]


class LayerRule(_Table):
    """A rule that overrides a phase for the layers whose name matches the glob `match`."""

    match: str
    prefill: str | None = None
    decode: DecodeTable | None = None

    @model_validator(mode="after")
    def _says_something(self) -> LayerRule:
        if self.prefill is None and self.decode is None:
            raise ValueError(
                f"layer rule {shown(self.match)} sets neither 'prefill' nor 'decode'; give one of "
                "them, or remove the rule"
            )
        if self.decode is not None:
            _check_order(self.decode)
        return self


class Load(_Table):
    """The sets of a busy engine; `enter` and `leave` are numbers of waiting requests."""

    enter: PositiveInt
    leave: NonNegativeInt
    prefill: str | None = None
    decode: DecodeTable | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Load:
        if self.leave >= self.enter:
            raise ValueError(
                f"'leave' is {self.leave}, but has to be less than 'enter', {self.enter}; lower it"
            )
        if self.prefill is None and self.decode is None:
            raise ValueError("it sets neither 'prefill' nor 'decode'; give one of them")
        if self.decode is not None:
            _check_order(self.decode)
        return self


@dataclass(frozen=True, slots=True)
class LayerRoute:
    """The routing of one layer, ready for the hot path.

    `bounds[i]` is the largest batch of `decode[i]`; the last decode entry has
    no bound, so `len(decode) == len(bounds) + 1`. `busy` is the route of a busy
    engine, None without a `load`.
    """

    prefill: str
    bounds: tuple[int, ...]
    decode: tuple[str, ...]
    busy: LayerRoute | None = None

    def choose(self, step: Step) -> str:
        """Choose the set that this layer uses in `step`, whose `is_busy` is known."""
        route = self.busy if step.is_busy and self.busy is not None else self
        if step.phase is Phase.PREFILL:
            return route.prefill
        return route.decode[bisect_left(route.bounds, step.batch)]

    def pair(self, step: Step) -> tuple[str, str]:
        """Choose the sets that this layer uses in `step` in a calm engine, and in a busy one."""
        calm, busy = (replace(step, is_busy=is_busy) for is_busy in (False, True))
        return self.choose(calm), self.choose(busy)

    def pairs(self, max_batch: int) -> frozenset[tuple[Phase, str, str]]:
        """List phase, calm and busy set of every step with at most `max_batch` requests."""
        bounds = self.bounds + (self.busy.bounds if self.busy is not None else ())
        # The sets are the same from one bound to the next.
        batches = {max_batch, *(min(bound, max_batch) for bound in bounds)}
        steps = (Step(phase, batch) for phase in Phase for batch in batches)
        return frozenset((step.phase, *self.pair(step)) for step in steps)

    def reachable(self, max_batch: int | None = None) -> frozenset[str]:
        """List the sets that some step with at most `max_batch` requests can choose."""
        rows = len(self.decode) if max_batch is None else bisect_left(self.bounds, max_batch) + 1
        calm = frozenset((self.prefill, *self.decode[:rows]))
        return calm if self.busy is None else calm | self.busy.reachable(max_batch)


class Routing(_Table):
    """The whole table; construct it with `Routing.parse`, which names what is wrong."""

    prefill: str
    decode: DecodeTable
    layers: tuple[LayerRule, ...] = Field(default=(), max_length=MOST_RULES)
    load: Load | None = None

    @model_validator(mode="after")
    def _total(self) -> Routing:
        _check_order(self.decode)
        return self

    @classmethod
    def parse(cls, table: object, sets: Iterable[str]) -> Routing:
        """Validate `table` (the JSON object above) against the names of the sets.

        Raises RoutingError with the offending key or value.
        """
        from pydantic import ValidationError

        try:
            routing = cls.model_validate(table)
        except ValidationError as error:
            raise RoutingError(one_line(error, "routing")) from None
        routing.check_sets(sets)
        return routing

    @classmethod
    def forced(cls, set_name: str) -> Routing:
        """Make the table that has one set for every step and layer."""
        return cls(prefill=set_name, decode=(DecodeRow(set_name=set_name),))

    def check_sets(self, sets: Iterable[str]) -> None:
        """Raise RoutingError when the table names a set that is not in `sets`."""
        known = tuple(sets)
        for where, name in self._mentions():
            if name not in known:
                raise RoutingError(
                    f"{where} names the set {shown(name)}, but the checkpoint has "
                    f"{', '.join(known)}; name one of these"
                )

    def route(self, names: Sequence[str], fused_name: str | None = None) -> LayerRoute:
        """Find the route of one layer; without a name, the route that no layer rule changes.

        `names` are the names of the layer: several where vLLM fuses
        projections (q, k and v run as one `fused_name`), and all of them have
        to agree. Raises RoutingError when a rule tells them apart.
        """
        prefill, decode = self.prefill, self.decode
        rule = self._rule(names, fused_name)
        if rule is not None:
            prefill = rule.prefill or prefill
            decode = rule.decode or decode
        bounds = tuple(row.max_batch for row in decode if row.max_batch is not None)
        busy = self.in_state(True).route(names, fused_name) if self.load is not None else None
        return LayerRoute(prefill, bounds, tuple(row.set_name for row in decode), busy)

    def in_state(self, is_busy: bool) -> Routing:
        """Make the table of a calm or of a busy engine, which has no `load`."""
        given = self.load if is_busy else None
        state: dict[str, Any] = {"load": None}
        if given is not None:
            state["prefill"] = given.prefill or self.prefill
            state["decode"] = given.decode or self.decode
        return self.model_copy(update=state)

    def sets(self) -> frozenset[str]:
        """List every set that the table names."""
        return frozenset(name for _, name in self._mentions())

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """List the globs of the layer rules that match none of `names`."""
        names = list(names)
        return [
            rule.match
            for rule in self.layers
            if not any(fnmatchcase(name, rule.match) for name in names)
        ]

    def to_json(self) -> dict[str, Any]:
        """Make the JSON object that `parse` reads."""
        return self.model_dump(by_alias=True, exclude_none=True, exclude_defaults=True, mode="json")

    def rename(self, map_name: Callable[[str], str]) -> Routing:
        """Pass the globs of the layer rules through `map_name`; returns a new table."""
        rules = [rule.model_copy(update={"match": map_name(rule.match)}) for rule in self.layers]
        return self.model_copy(update={"layers": tuple(rules)})

    def _rule(self, names: Sequence[str], fused_name: str | None) -> LayerRule | None:
        for rule in self.layers:
            if fused_name is not None and fnmatchcase(fused_name, rule.match):
                return rule
            hits = [name for name in names if fnmatchcase(name, rule.match)]
            if names and len(hits) == len(names):
                return rule
            if hits:
                raise RoutingError(
                    f"layer rule {shown(rule.match)} matches {', '.join(hits)} but not all of "
                    f"{', '.join(names)}, which run as one layer; widen the glob"
                )
        return None

    def _mentions(self) -> Iterable[tuple[str, str]]:
        yield "routing.prefill", self.prefill
        yield from (("routing.decode", row.set_name) for row in self.decode)
        for rule in self.layers:
            where = f"layer rule {shown(rule.match)}"
            if rule.prefill is not None:
                yield where, rule.prefill
            yield from ((where, row.set_name) for row in rule.decode or ())
        if self.load is not None:
            if self.load.prefill is not None:
                yield "routing.load.prefill", self.load.prefill
            yield from (("routing.load.decode", row.set_name) for row in self.load.decode or ())


def parse_decode(text: str) -> tuple[DecodeRow, ...]:
    """Read a decode table as the command line writes it: `16:w4a16,w8a8`.

    Each row is `MAX_BATCH:SET`; the last one is `SET` alone.
    """
    where = f"--decode {shown(text)}"
    rows = []
    for item in text.split(","):
        bound, colon, name = item.strip().rpartition(":")
        if colon and not _BATCH.fullmatch(bound):
            raise RoutingError(
                f"{where}: {shown(bound)} is not a batch size from 1 to {10**_BATCH_DIGITS - 1}; "
                f"{_DECODE_FORM}"
            )
        if not name:
            raise RoutingError(f"{where}: a set's name is missing; {_DECODE_FORM}")
        rows.append(DecodeRow(max_batch=int(bound) if colon else None, set_name=name))
    try:
        _check_order(rows)
    except ValueError as error:
        raise RoutingError(f"{where}: {error}") from None
    return tuple(rows)


def _check_order(rows: Sequence[DecodeRow]) -> None:
    if not rows:
        raise ValueError("the decode table is empty; give it a set")
    *bounded, last = rows
    if last.max_batch is not None:
        raise ValueError(
            f"no row serves batches above {last.max_batch}; end the decode table with a set "
            "without a batch size"
        )
    sizes = [row.max_batch for row in bounded]
    if None in sizes:
        raise ValueError(
            f"the decode row {sizes.index(None) + 1} has no batch size, so the rows after it "
            "are never reached; give it one, or remove what follows"
        )
    if any(a >= b for a, b in itertools.pairwise(sizes)):  # type: ignore[operator]
        raise ValueError(
            f"the batch sizes of the decode table must grow: {shown(sizes)}; sort its rows"
        )
