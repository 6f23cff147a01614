"""Files in which an engine and its front end share memory; they go when the front end does.

All files of a front end begin with its stem, `FOLDER/vllm-qoq-<32 hex digits>-`. The process that
made the stem holds a lock on `STEM-lock` as long as it or a process that it forked lives. Killed,
it leaves its files; the next stem that is made on the machine finds the lock free and removes them.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import re
import stat
import tempfile
import uuid
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")
_LOCK = re.compile(r"(vllm-qoq-[0-9a-f]{32})-lock")


def new_stem() -> str:
    """Make a stem for the files of one front end, which are removed when this process ends."""
    folder = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    remove_abandoned(folder)
    while True:
        stem = folder / f"vllm-qoq-{uuid.uuid4().hex}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(f"{stem}-lock", flags, 0o600)  # never closed, so the process holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Without a link, another process took it for abandoned before it was locked.
        if os.fstat(lock).st_nlink:
            atexit.register(_remove_own, stem, os.getpid())
            return str(stem)
        os.close(lock)


def remove_abandoned(folder: Path) -> None:
    """Remove the files of every stem in `folder` whose lock nobody holds; foreign files stay."""
    for path in folder.glob("vllm-qoq-*-lock"):
        name = _LOCK.fullmatch(path.name)
        if name is None:
            continue
        try:
            lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # it is gone by now, or another user's
            continue
        try:
            found = os.fstat(lock)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                continue
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder / name[1])
        except OSError:  # the lock is held, so its process lives
            continue
        finally:
            os.close(lock)


def _remove_own(stem: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child inherits the exit handler, not the files
        _remove(stem)


def _remove(stem: Path) -> None:
    lock = Path(f"{stem}-lock")
    # The lock goes last: if this is interrupted, it still says whose the rest is.
    for path in (*(p for p in stem.parent.glob(f"{stem.name}-*") if p != lock), lock):
        path.unlink(missing_ok=True)
