"""One table of the runs of several models: `vllm-qoq bench table`.

Each run is the folder that `vllm-qoq bench serving MODEL -o OUT` writes. Runs of different cards or
lengths are refused, because their numbers do not compare.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_qoq.bench import BenchError
from vllm_qoq.bench.report import number
from vllm_qoq.bench.serving.result import is_on_one_card
from vllm_qoq.checkpoint.folder import read_json
from vllm_qoq.errors import FormatError, one_line, printable
from vllm_qoq.markdown import markdown_table

CUT = " *"
"""What stands behind a model whose run was cut off."""
_FILE = "serving.json"
_LARGEST = 10 << 20


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Case(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt: int = Field(gt=0)
    new: int = Field(gt=0)
    batch: int = Field(gt=0)
    tokens_per_second: Positive
    share_of_floor: Positive | None


class _Engine(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    is_ours: bool
    left_out: str | None
    cases: tuple[_Case, ...]


class _Environment(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    packages: dict[str, str | None]


class _Run(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    benchmark: Literal["serving"]
    model: str | None
    device: str
    environment: _Environment
    engine_args: dict[str, Any]
    engines: tuple[_Engine, ...]


@dataclass(frozen=True)
class Best:
    """The highest throughput of an engine.

    share   of the floor's throughput; None where the floor is not known
    is_cut  whether batches are missing because the run was cut off
    """

    name: str
    tokens_per_second: float
    batch: int
    share: float | None
    is_cut: bool


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
    """The rows of a card and of one pair of lengths.

    device  the card, or "several" of it
    peers   vLLM's own formats that were measured in any of the runs
    """

    device: str
    lengths: str
    rows: tuple[Row, ...]
    peers: tuple[str, ...]


def read(folders: Iterable[Path], lengths: str) -> Table:
    """Read the runs in `folders`.

    lengths  the pair to compare, "1024/512"

    Raises BenchError for a folder that is no run, for runs of different cards, versions or engine
    arguments, for a model that is there twice, and for a run that lacks an engine of ours or of
    vLLM's with these lengths.
    """
    runs = {folder: _read(folder) for folder in folders}
    _check_alike("on", {folder: run.device for folder, run in runs.items()})
    versions = {folder: run.environment.packages.get("vllm") for folder, run in runs.items()}
    _check_alike("with vLLM", versions)
    arguments = {folder: json.dumps(run.engine_args) for folder, run in runs.items()}
    _check_alike("with --engine-args", arguments)
    rows = tuple(_row(folder, run, lengths) for folder, run in runs.items())
    models = [row.model for row in rows]
    if twice := {model for model in models if models.count(model) > 1}:
        raise BenchError(f"{', '.join(sorted(twice))}: is there twice; give one run of each model")
    peers = {engine.name for run in runs.values() for engine in run.engines if not engine.is_ours}
    first = next(iter(runs.values()))
    device = first.device if is_on_one_card(first.engine_args) else f"several {first.device}"
    return Table(device, lengths, rows, tuple(sorted(peers)))


def _check_alike(what: str, values: Mapping[Path, object]) -> None:
    """Raise BenchError unless all runs have the same value, which a comparison needs."""
    (first, expected), *others = values.items()
    for folder, value in others:
        if value != expected:
            raise BenchError(
                f"{first} was measured {what} {expected}, {folder} {what} {value}; compare runs "
                "that are alike"
            )


def finding(table: Table) -> str:
    """Say in one sentence what the table shows."""
    ratios = [row.speedup for row in table.rows]
    low, high = min(ratios), max(ratios)
    span = f"{low:.2f}x" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f}x to {high:.2f}x"
    models = "one model" if len(ratios) == 1 else f"{len(ratios)} models"
    card = table.device if table.device.startswith("several") else f"one {table.device}"
    return f"{span} the tokens a second of {best_of(table)}, {models} on {card}"


def best_of(table: Table) -> str:
    """Name what ours is compared with."""
    if len(table.peers) == 1:
        return f"vLLM's {table.peers[0]}"
    return f"the best of vLLM's {', '.join(table.peers)}"


def markdown(table: Table) -> str:
    """Write table.md: the finding, and a row a model."""
    heads = [
        *("model", "vLLM's", "tokens/s", "batch"),
        *("ours", "tokens/s", "batch", "of the floor", "ours / vLLM's", "at the floor"),
    ]
    rows = [
        [
            _cell(row.model) + (CUT if row.ours.is_cut or row.peer.is_cut else ""),
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
        "its bytes and\noperations.\n\n" + markdown_table(heads, rows) + _note(table)
    )


def _note(table: Table) -> str:
    is_cut = any(one.is_cut for row in table.rows for one in (row.ours, row.peer))
    return f"\n{CUT.strip()} not all batches were measured\n" if is_cut else ""


def _cell(text: str) -> str:
    """Make a cell of foreign text, which may hold what a terminal or a table obeys."""
    return printable(text).replace("|", "\\|")


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
    except FormatError as error:
        raise BenchError(f"{file}: {error}") from None


def _row(folder: Path, run: _Run, lengths: str) -> Row:
    ours, peer = (_best(run, lengths, is_ours) for is_ours in (True, False))
    if ours is None or peer is None:
        missing = "format of ours" if ours is None else "format of vLLM's own"
        raise BenchError(f"{folder}: has no {missing} with lengths {lengths}; measure both")
    return Row(run.model or str(folder), ours, peer)


def _best(run: _Run, lengths: str, is_ours: bool) -> Best | None:
    found = [
        Best(
            engine.name,
            case.tokens_per_second,
            case.batch,
            case.share_of_floor,
            engine.left_out is not None,
        )
        for engine in run.engines
        if engine.is_ours == is_ours
        for case in engine.cases
        if f"{case.prompt}/{case.new}" == lengths
    ]
    return max(found, key=lambda one: one.tokens_per_second, default=None)
