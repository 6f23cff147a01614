"""The work folder: what was asked and what was measured, so that the same command goes on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vllm_qoq.bench import BenchError
from vllm_qoq.bench.serving.job import WEIGHTS, Resume, Subject
from vllm_qoq.checkpoint.folder import error_context, read_config
from vllm_qoq.checkpoint.replace import NO_LOCKS
from vllm_qoq.models.config import CONFIG


class Files(NamedTuple):
    """The files of a subject: what is asked of its process, what it measured, and its log."""

    request: Path
    records: Path
    log: Path


class Fingerprinted(Protocol):
    """A request with a digest of all that its results depend on."""

    @property
    def fingerprint(self) -> str:
        """The digest."""

    def model_dump_json(self, *, indent: int) -> str:
        """Write it as JSON."""


_MARK = "vllm-qoq-bench.lock"


@contextmanager
def opened(work: Path) -> Iterator[None]:
    """Make the folder, or go on with one that a benchmark has made, for this process alone.

    Raises BenchError for a folder with files and without the mark of a benchmark, and while another
    run is in it. An interrupt within the block says where the results are.
    """
    mark = work / _MARK
    if work.is_dir() and any(work.iterdir()) and not mark.exists():
        raise BenchError(
            f"{work}: has files that are not of a benchmark; choose another --work-dir"
        )
    work.mkdir(parents=True, exist_ok=True)
    with mark.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise BenchError(
                    f"{work}: another run is in it; choose another --work-dir"
                ) from None
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"results so far are in {work}; the same command goes on from there"
            ) from None


def require_results(work: Path, reasons: Mapping[str, str | None]) -> None:
    """Raise BenchError where no subject has a result.

    reasons  name of a subject -> why it has none; None for one that has
    """
    if all(reasons.values()):
        said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise BenchError(f"nothing could be measured: {said}; logs are in {work}")


def close(work: Path) -> None:
    """Delete the mark, and the folder unless it has anything else in it."""
    (work / _MARK).unlink(missing_ok=True)
    delete_if_empty(work)


def files(work: Path, name: str) -> Files:
    """Name the files of a subject."""
    return Files(*(work / f"{name}.{kind}" for kind in ("json", "jsonl", "log")))


def fingerprint(depends: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """Digest what a result depends on, the packages and GPUs of the environment included."""
    everything = {
        **depends,
        "packages": environment["packages"],
        "gpus": [gpu["name"] for gpu in environment["gpus"] or ()],
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def identity(subject: Subject) -> object:
    """Say which model a subject is: its config, and of a checkpoint the files with its weights.

    A file is the same while its size and its time of change are.
    """
    if subject.config is not None:
        return subject.config
    folder = Path(subject.request.model)
    weights = sorted(folder.glob(WEIGHTS))
    stats = {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in weights}
    with error_context(folder):
        return {"folder": str(folder), "config": read_config(folder), "files": stats}


def prepare(work: Path, requests: Mapping[str, Fingerprinted], resume: Resume) -> None:
    """Write the request of each subject.

    Raises BenchError, before it writes, where the folder has results of another kind of run, or
    none and they are required.
    """
    for name, request in requests.items():
        found = files(work, name)
        if resume == "required" and not found.records.exists():
            raise BenchError(f"{found.records}: does not exist, so there is nothing to go on with")
        if resume != "never" and found.records.exists():
            _check_same(found.request, request.fingerprint)
    for name, request in requests.items():
        found = files(work, name)
        if resume == "never":
            found.records.unlink(missing_ok=True)
        elif found.records.exists():
            # Of a line that a killed run has left unfinished, what comes next would be a part.
            os.truncate(found.records, found.records.read_bytes().rfind(b"\n") + 1)
        found.request.write_text(request.model_dump_json(indent=1) + "\n", encoding="utf-8")


def write_config(work: Path, subject: Subject) -> None:
    """Write the `config.json` of a subject with dummy weights; checkpoints have their own."""
    if subject.config is not None:
        folder = work / subject.name
        folder.mkdir(exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(subject.config, indent=1) + "\n")


def delete(work: Path, name: str, written: Iterable[str] = (CONFIG,)) -> None:
    """Delete the files of a subject, and those that were written for its dummy weights."""
    for file in (*files(work, name), *(work / name / one for one in written)):
        file.unlink(missing_ok=True)
    delete_if_empty(work / name)


def delete_if_empty(folder: Path) -> None:
    """Delete a folder, unless it is not there or has anything in it."""
    with suppress(OSError):
        folder.rmdir()


def _check_same(request: Path, expected: str) -> None:
    try:
        found = json.loads(request.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        found = None
    if not isinstance(found, dict) or found.get("fingerprint") != expected:
        raise BenchError(
            f"{request}: is of a run with another model, engine, GPU or version; choose another "
            "--work-dir, or begin anew: --resume never"
        )
