"""The output folder: which run it is of, and which jobs are in it.

`vllm-qoq-caption.json` in it says what all captions depend on, so that a run with another prompt
or model does not mix its own among them. Each job has a file with a lock while it runs, which says
how the shards are divided among the jobs.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_qoq.caption.errors import CaptionError
from vllm_qoq.caption.lock import holder, locked, note_of, sign
from vllm_qoq.checkpoint.folder import read_json
from vllm_qoq.checkpoint.writer import json_bytes, replace_file
from vllm_qoq.errors import FormatError, printable, shown

PREFIX = "vllm-qoq-caption"
"""Of all files in the folder that are of no shard."""

_RUN = f"{PREFIX}.json"
_RUN_BYTES = 1 << 20
_MARK, _VERSION = "vllm-qoq captions", 2
_SAMPLE_BYTES = 1 << 16
_POLL_SECONDS, _PATIENCE_SECONDS = 0.05, 10.0
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# Configs, templates, and the vocabularies of tokenizers.
_SMALL = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".vocab", ".bpe", ".spm")


def check(out: Path, run: Mapping[str, Any]) -> None:
    """Raise CaptionError for a folder with captions of another run; nothing is written."""
    if not os.path.lexists(out):
        parent = out.absolute().parent
        for above in (parent, *parent.parents):
            if above.exists() and not above.is_dir():
                raise CaptionError(
                    f"{above}: is a file, not a folder; choose another output folder"
                )
        if not parent.is_dir():
            raise CaptionError(f"{parent}: no such folder; create it first")
        return
    if not out.is_dir():
        raise CaptionError(f"{out}: is not a folder; choose another output folder")
    if not os.access(out, os.W_OK | os.X_OK):
        raise CaptionError(f"{out}: not writable; choose another output folder")
    file = out / _RUN
    if not file.exists():
        foreign = sorted(one.name for one in out.iterdir() if PREFIX not in one.name)
        if foreign:
            raise CaptionError(
                f"{out}: holds {shown(foreign[0])}, which is of no captions; choose another "
                "output folder"
            )
        return
    try:
        document = read_json(file, _RUN_BYTES)
    except FormatError:
        document = {}
    known = document.get("run")
    if document.get(_MARK) != _VERSION or not isinstance(known, dict):
        raise CaptionError(
            f"{file}: is not of this version of vllm-qoq; choose another output folder"
        )
    wanted = json.loads(json.dumps(run))
    if known != wanted and not has_captions(out):
        return  # the first start had failed
    for key in {**wanted, **known}:
        if known.get(key) != wanted.get(key):
            raise CaptionError(
                f"{out}: has captions of another run: {key} was {shown(known.get(key))} and is "
                f"{shown(wanted.get(key))} now; use the old value, or choose another output folder"
            )


@contextmanager
def opened(
    out: Path, run: Mapping[str, Any], job: str, division: Mapping[str, Any]
) -> Iterator[None]:
    """Make the folder or go on with it, as the only process that is this job.

    division  how shards are divided among jobs; the same for all that run at once

    Raises CaptionError while another process is this job, or works in the folder with another
    division or run, and for a folder of another run.
    """
    check(out, run)
    out.mkdir(exist_ok=True)
    lock = out / f"{PREFIX}.{job}.lock"
    with _alone(out):
        handle = locked(lock)
        if handle is None:
            raise CaptionError(
                f"{out}: another process captions there as {job}: {holder(lock)}; wait for it, or "
                "choose another output folder"
            )
        try:
            note = json.loads(json.dumps({**run, **division}))
            sign(handle, note)
            _check_others(out, lock, note)
            _begin(out, run)
        except BaseException:
            _let_go(lock, handle)
            raise
    try:
        yield
    finally:
        _let_go(lock, handle)


def digest_of(model: Path) -> str:
    """Digest what is served: configs, tokenizer and templates, and of the weights names, sizes and
    the first and last 64 KiB. Other files, such as a README, may change."""
    digest = hashlib.sha256()
    for file in sorted(model.iterdir()):
        if not file.name.endswith((*_WEIGHTS, *_SMALL)) or not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode(errors="surrogateescape"))
        with file.open("rb") as opened_file:
            if file.suffix not in _WEIGHTS:
                digest.update(opened_file.read())
            else:
                digest.update(opened_file.read(_SAMPLE_BYTES))
                opened_file.seek(max(0, size - _SAMPLE_BYTES))
                digest.update(opened_file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def has_captions(out: Path) -> bool:
    """Whether there is more than files of a job that failed before its first line."""
    for parent, _, files in os.walk(out):
        for name in files:
            is_ours = Path(parent) == out and name.startswith((f"{PREFIX}.", f".{PREFIX}."))
            if not is_ours and not _is_empty(Path(parent) / name):
                return True
    return False


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Look around in the folder and change it while no other job does; says whom it waits for."""
    lock = out / f"{PREFIX}.lock"
    told = time.monotonic() + _PATIENCE_SECONDS
    while (handle := locked(lock)) is None:
        if time.monotonic() > told:
            told += _PATIENCE_SECONDS
            text = f"{lock}: waiting for {holder(lock)}; if it hangs, end it"
            print(printable(text), file=sys.stderr, flush=True)
        time.sleep(_POLL_SECONDS)
    try:
        sign(handle, {})
        yield
    finally:
        _let_go(lock, handle)


def _let_go(lock: Path, handle: int) -> None:
    lock.unlink(missing_ok=True)
    os.close(handle)


def _check_others(out: Path, own: Path, note: Mapping[str, Any]) -> None:
    """Raise CaptionError where a job that runs has another note than ours."""
    for lock in sorted(out.glob(f"{PREFIX}.job-*.lock")):
        if lock == own:
            continue
        handle = locked(lock)
        if handle is not None:  # left by a job that was killed
            _let_go(lock, handle)
            continue
        theirs = note_of(lock)
        for key, value in note.items():
            if key in theirs and theirs[key] != value:
                raise CaptionError(
                    f"{out}: a job with another {key.replace('_', ' ')} runs there: "
                    f"{shown(theirs[key])}, and here it is {shown(value)}; wait for {holder(lock)}"
                    ", or give all jobs of an output folder the same"
                )


def _begin(out: Path, run: Mapping[str, Any]) -> None:
    """Write what the folder is of, unless another job has."""
    check(out, run)
    content = json_bytes({_MARK: _VERSION, "run": dict(run)})
    file = out / _RUN
    if not file.exists() or file.read_bytes() != content:
        replace_file(file, content)


def _is_empty(file: Path) -> bool:
    """Whether a write-ahead file has its head alone."""
    if not file.name.endswith(".partial.jsonl"):
        return False
    try:
        with file.open("rb") as opened_file:
            opened_file.readline()
            return not opened_file.readline().endswith(b"\n")
    except FileNotFoundError:  # another job has just finished the shard
        return False
