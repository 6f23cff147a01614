"""A file that one process has for itself; the system lets go of it with the process."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from vllm_qoq.checkpoint.replace import NO_LOCKS

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


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
