"""The output folder: which run it is of, and which job is in it.

`vllm-qoq-caption.json` in it says what all captions depend on, so that a run with another prompt
or model does not mix its own among them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_qoq.caption.errors import CaptionError
from vllm_qoq.caption.lock import locked
from vllm_qoq.checkpoint.folder import read_json
from vllm_qoq.checkpoint.writer import json_bytes, replace_file
from vllm_qoq.errors import FormatError, shown

PREFIX = "vllm-qoq-caption"
"""Of all files in the folder that are of no shard."""

_RUN = f"{PREFIX}.json"
_RUN_BYTES = 1 << 20
_MARK, _VERSION = "vllm-qoq captions", 1
_SAMPLE_BYTES = 1 << 16
_POLL_SECONDS = 0.05


def check(out: Path, run: Mapping[str, Any]) -> None:
    """Raise CaptionError for a folder that is not of this run; nothing is written."""
    if not os.path.lexists(out):
        if not out.absolute().parent.is_dir():
            raise CaptionError(f"{out.absolute().parent}: no such folder; create it first")
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
    for key in {**wanted, **known}:
        if known.get(key) != wanted.get(key):
            raise CaptionError(
                f"{out}: has captions of another run: {key} was {shown(known.get(key))} and is "
                f"{shown(wanted.get(key))} now; use the old value, or choose another output folder"
            )


@contextmanager
def opened(out: Path, run: Mapping[str, Any], job: str) -> Iterator[None]:
    """Make the folder or go on with it, as the only process that is this job.

    Raises CaptionError while another process is, and for a folder of another run.
    """
    check(out, run)
    out.mkdir(exist_ok=True)
    lock = out / f"{PREFIX}.{job}.lock"
    handle = locked(lock)
    if handle is None:
        raise CaptionError(
            f"{out}: another process captions there as {job}; wait for it, or choose another "
            "output folder"
        )
    try:
        _begin(out, run)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def digest_of(model: Path) -> str:
    """Digest what is served: configs, tokenizer and templates, and of the weights names, sizes and
    the first and last 64 KiB."""
    digest = hashlib.sha256()
    for file in sorted(model.iterdir()):
        if file.suffix not in (".json", ".jinja", ".model", ".safetensors") or not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode(errors="surrogateescape"))
        with file.open("rb") as opened_file:
            if file.suffix != ".safetensors":
                digest.update(opened_file.read())
            else:
                digest.update(opened_file.read(_SAMPLE_BYTES))
                opened_file.seek(max(0, size - _SAMPLE_BYTES))
                digest.update(opened_file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _begin(out: Path, run: Mapping[str, Any]) -> None:
    """Write what the folder is of, unless another job has."""
    lock = out / f"{PREFIX}.lock"
    while (handle := locked(lock)) is None:
        time.sleep(_POLL_SECONDS)
    try:
        check(out, run)
        if not (out / _RUN).exists():
            replace_file(out / _RUN, json_bytes({_MARK: _VERSION, "run": dict(run)}))
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)
