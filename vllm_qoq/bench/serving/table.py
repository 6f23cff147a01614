"""One table of the runs of several models: `vllm-qoq bench table`.

Each run is the folder that `vllm-qoq bench serving MODEL -o OUT` writes. Runs of different cards or
lengths are refused, because their numbers do not compare.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_qoq.bench import BenchError
from vllm_qoq.bench.report import number
from vllm_qoq.checkpoint.folder import read_json
from vllm_qoq.errors import one_line
from vllm_qoq.markdown import markdown_table

_FILE = "serving.json"
_LARGEST = 10 << 20


class _Case(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt: int
    new: int
    batch: int
    tokens_per_second: float
    share_of_floor: float | None


class _Engine(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    is_ours: bool
    weights_gib: float | None
    cases: tuple[_Case, ...]


class _Run(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str | None
    device: str
    engines: tuple[_Engine, ...]


@dataclass(frozen=True)
class Best:
    """The highest throughput of an engine.

    share  of the floor's throughput; None where the floor is not known
    """

    name: str
    tokens_per_second: float
    batch: int
    share: float | None
    weights_gib: float | None


@dataclass(frozen=True)
class Row:
    """A model: our best engine beside the best of vLLM's own formats."""

    model: str
    ours: Best
    peer: Best

    @property
    def speedup(self) -> float:
        """How many times as many tokens a second ours generates."""
        return self.ours.tokens_per_second / self.peer.tokens_per_second

    @property
    def limit(self) -> float | None:
        """What `speedup` would be if ours were at its floor; None where that is not known."""
        return None if self.ours.share is None else self.speedup / self.ours.share


@dataclass(frozen=True)
class Table:
    """The rows of a card and of one pair of lengths."""

    device: str
    lengths: str
    rows: tuple[Row, ...]


def read(folders: Iterable[Path], lengths: str) -> Table:
    """Read the runs in `folders`.

    lengths  the pair to compare, "1024/512"

    Raises BenchError for a folder that is no run, for runs of different cards, and for a run that
    lacks an engine of ours or of vLLM's with these lengths.
    """
    runs = {folder: _read(folder) for folder in folders}
    devices = {run.device: folder for folder, run in runs.items()}
    if len(devices) > 1:
        (one, first), (other, second) = list(devices.items())[:2]
        raise BenchError(
            f"{first} was measured on {one}, {second} on {other}; compare runs of one card"
        )
    rows = tuple(_row(folder, run, lengths) for folder, run in runs.items())
    return Table(next(iter(devices)), lengths, rows)


def finding(table: Table) -> str:
    """Say in one sentence what the table shows."""
    ratios = [row.speedup for row in table.rows]
    low, high = min(ratios), max(ratios)
    span = f"{low:.2f}x" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f}x to {high:.2f}x"
    models = "one model" if len(ratios) == 1 else f"{len(ratios)} models"
    return f"{span} the tokens a second of vLLM's best format, {models} on one {table.device}"


def markdown(table: Table) -> str:
    """Write table.md: the finding, and a row a model."""
    heads = [
        *("model", "vLLM's best", "tokens/s", "batch"),
        *("ours", "tokens/s", "batch", "of the floor", "ours / vLLM's", "at the floor"),
    ]
    rows = [
        [
            row.model,
            *(row.peer.name, f"{row.peer.tokens_per_second:,.0f}", str(row.peer.batch)),
            *(row.ours.name, f"{row.ours.tokens_per_second:,.0f}", str(row.ours.batch)),
            number(row.ours.share, ".0%"),
            f"{row.speedup:.2f}",
            number(row.limit, ".2f"),
        ]
        for row in table.rows
    ]
    prompt, new = table.lengths.split("/")
    return (
        f"# Highest throughput, {table.device}\n\n{finding(table)}.\n\n"
        f"{prompt} tokens in, {new} out; new tokens over the whole time, prompts included, each at "
        "its best\nbatch. The last column is what the ratio would be if ours took no longer than "
        "its bytes and\noperations.\n\n" + markdown_table(heads, rows)
    )


def to_json(table: Table) -> dict[str, Any]:
    """Make the document of --json and table.json."""
    return {
        "benchmark": "table",
        "device": table.device,
        "lengths": table.lengths,
        "models": [
            {
                "model": row.model,
                "ours": vars(row.ours),
                "peer": vars(row.peer),
                "speedup": row.speedup,
                "speedup_at_our_floor": row.limit,
            }
            for row in table.rows
        ],
    }


def _read(folder: Path) -> _Run:
    file = folder / _FILE if folder.is_dir() else folder
    if not file.is_file():
        raise BenchError(f"{folder}: has no {_FILE}, which `vllm-qoq bench serving -o OUT` writes")
    try:
        return _Run.model_validate(read_json(file, _LARGEST))
    except ValidationError as error:
        raise BenchError(one_line(error, str(file))) from None


def _row(folder: Path, run: _Run, lengths: str) -> Row:
    ours, peer = (_best(run, lengths, is_ours) for is_ours in (True, False))
    if ours is None or peer is None:
        missing = "format of ours" if ours is None else "format of vLLM's own"
        raise BenchError(f"{folder}: has no {missing} with lengths {lengths}; measure both")
    return Row(run.model or str(folder), ours, peer)


def _best(run: _Run, lengths: str, is_ours: bool) -> Best | None:
    found = [
        Best(
            engine.name, case.tokens_per_second, case.batch, case.share_of_floor, engine.weights_gib
        )
        for engine in run.engines
        if engine.is_ours == is_ours
        for case in engine.cases
        if f"{case.prompt}/{case.new}" == lengths
    ]
    return max(found, key=lambda one: one.tokens_per_second, default=None)
