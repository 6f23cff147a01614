"""A file that one process has for itself; the system lets go of it with the process."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_qoq.checkpoint.replace import NO_LOCKS
from vllm_qoq.errors import shown

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_NOTE_BYTES = 1 << 16


def locked(path: Path) -> int | None:
    """Open or make a file for this process alone; None where another process has it.

    Who deletes the file does so before it closes what this returns. On a file system without locks
    nobody is kept out.
    """
    while True:
        handle = os.open(path, _FLAGS, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(handle)
                return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # who had it has just deleted it


def sign(handle: int, note: Mapping[str, Any]) -> None:
    """Write into a file of `locked` who has it, since when, and a note for others."""
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    signed = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, **note}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(signed).encode(), 0)


def note_of(path: Path) -> Mapping[str, Any]:
    """Read what `sign` wrote; nothing where the file is gone, or not signed yet."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_NOTE_BYTES))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def holder(path: Path) -> str:
    """Say who has a file, for people."""
    note = note_of(path)
    if "pid" not in note:
        return "a process that has just begun"
    return (
        f"process {shown(note['pid'])} on {shown(note.get('host'))}, since "
        f"{shown(note.get('since'))}"
    )
