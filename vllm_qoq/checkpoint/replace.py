"""Writing of a folder whole or not at all, and replacing an older one of ours.

While a run writes OUT, these lie beside it:

    .OUT.partial    what becomes OUT; the run holds a lock on a file in it
    .OUT.replaced   the old OUT, from the moment before .OUT.partial gets its name
                    until it has been deleted; it takes over the file with the lock

The lock is the system's and ends with the process, whatever ends it, so the next run
tells what a killed one left from what another run is writing, also from other
containers. Only a folder with that file, or an empty one, is taken for a leftover, so
that file is the last to be deleted of a folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

from vllm_qoq.checkpoint.writer import sync_folder
from vllm_qoq.errors import UserError, printable


class OutputError(UserError):
    """A folder that cannot be written as asked; the message says why, and what to do instead."""


LOCK = ".vllm-qoq-lock"
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})
"""The error numbers by which a file system says that it has no locks."""
_LONGEST_NAME = 255

Foreign = Callable[[Path], str | None]
"""A function that says why a folder may not be deleted; None where all in it is ours."""


def partial_of(out: Path) -> Path:
    """The folder in which `out`, a resolved path, is written."""
    return out.with_name(f".{out.name}.partial")


def replaced_of(out: Path) -> Path:
    """The name for the older folder that `out`, a resolved path, replaces."""
    return out.with_name(f".{out.name}.replaced")


def is_name_short(out: Path) -> bool:
    """Whether the names above fit into a folder's entry."""
    return len(os.fsencode(replaced_of(out).name)) <= _LONGEST_NAME


def recover(out: Path) -> None:
    """Give an old output its name back that a killed run had moved aside.

    Raises OutputError where another run is writing `out`, a resolved path.
    """
    partial, old = partial_of(out), replaced_of(out)
    with _leftover(partial):
        if old.is_dir() and not old.is_symlink() and not out.exists():
            old.rename(out)
            sync_folder(out.parent)
            print(
                f"{printable(str(out))}: is back; a run was killed while it replaced it",
                file=sys.stderr,
            )


@contextmanager
def replacing(out: Path, overwrite: bool, foreign: Foreign) -> Iterator[Path]:
    """Make a hidden sibling of `out` to write into, which becomes `out` at the end.

    Whatever ends the body early, the sibling is removed, and `out` is as it was. SIGTERM
    ends it like Ctrl-C, and neither interrupts the clearing up.
    """
    out = out.resolve()
    recover(out)
    partial, old = partial_of(out), replaced_of(out)
    lock: IO[bytes] | None = None
    with _Interrupts() as interrupts:
        try:
            with interrupts.held():
                _clear(partial, old, foreign)
                lock = _create(partial)
            yield partial
            interrupts.hold()
            _check(out, overwrite, foreign)
            _swap(partial, out, old)
        except KeyboardInterrupt:
            interrupts.hold()
            _remove(partial, lock)
            raise KeyboardInterrupt(_state(out, partial)) from None
        except BaseException:
            interrupts.hold()
            _remove(partial, lock)
            raise
        if old.exists():
            (out / LOCK).rename(old / LOCK)
            with suppress(OSError):
                _delete(old)
        else:
            (out / LOCK).unlink()
        lock.close()
        if old.exists():
            print(
                f"{printable(str(old))}: is the old output and could not be deleted; delete it",
                file=sys.stderr,
            )


def _check(out: Path, overwrite: bool, foreign: Foreign) -> None:
    """Raise OutputError if `out` must not be replaced: it may have changed during a long run."""
    if not os.path.lexists(out):
        return
    if not overwrite or out.is_symlink() or not out.is_dir():
        raise OutputError(f"{out}: appeared in the meantime; choose another folder")
    if reason := foreign(out):
        raise OutputError(f"{out}: {reason}; choose another folder")


def _swap(partial: Path, out: Path, old: Path) -> None:
    has_old = out.exists()
    if has_old:
        out.rename(old)
    try:
        partial.rename(out)
        sync_folder(out.parent)
    except BaseException:
        if not partial.exists():
            out.rename(partial)
        if has_old:
            old.rename(out)
        raise


def _clear(partial: Path, old: Path, foreign: Foreign) -> None:
    """Delete the folders that killed runs left."""
    with _leftover(partial) as is_left:
        if is_left:
            _delete(partial)
    # `recover` gives the old folder its name back where `out` is missing, so `out` is complete.
    if old.is_dir() and not old.is_symlink() and not (old / LOCK).exists() and not foreign(old):
        _delete(old)
    with _leftover(old) as is_left:
        if is_left:
            _delete(old)


@contextmanager
def _leftover(partial: Path) -> Iterator[bool]:
    """Take the lock of a folder that a killed run left; whether there is such a folder.

    Raises OutputError where a run is alive, or where the folder is not ours.
    """
    if not os.path.lexists(partial):
        yield False
        return
    in_the_way = OutputError(f"{partial}: is in the way, and not ours to delete; move it elsewhere")
    if partial.is_symlink() or not partial.is_dir():
        raise in_the_way
    if not any(partial.iterdir()):
        yield True
        return
    if (partial / LOCK).is_symlink() or not (partial / LOCK).is_file():
        raise in_the_way
    with open(partial / LOCK, "r+b") as file:
        if not _take(file, partial):
            raise in_the_way
        yield True


def _create(partial: Path) -> IO[bytes]:
    """Make the folder `partial` and lock it for this process."""
    busy = OutputError(_busy(partial))
    try:
        partial.mkdir()
        lock = open(partial / LOCK, "xb")  # noqa: SIM115 - open until the folder has its name
    except (FileExistsError, FileNotFoundError):
        if partial.parent.is_dir():
            raise busy from None
        raise
    _take(lock, partial)
    if not (partial / LOCK).exists():  # another run took the empty folder for a leftover
        raise busy
    return lock


def _take(file: IO[bytes], partial: Path) -> bool:
    """Lock the file; False on a file system without locks.

    Raises OutputError where another run has the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(_busy(partial)) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _busy(partial: Path) -> str:
    return f"{partial}: another run is writing there; wait for it, or choose another output folder"


def _remove(partial: Path, lock: IO[bytes] | None) -> None:
    if lock is not None:
        with suppress(OSError):
            _delete(partial)
        lock.close()


def _delete(folder: Path) -> None:
    """Delete a folder of ours, and last the file that tells that it is ours.

    If something cannot be deleted, the rest is, and its OSError is raised.
    """
    failed: OSError | None = None
    for item in sorted(folder.iterdir()):
        try:
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            elif item.name != LOCK:
                item.unlink()
        except OSError as error:
            failed = failed or error
    if failed is not None:
        raise failed
    (folder / LOCK).unlink(missing_ok=True)
    folder.rmdir()


def _state(out: Path, partial: Path) -> str:
    """Describe what an interrupted run leaves."""
    before = f"{out} is as it was" if out.exists() else f"{out} was not written"
    return f"{before}; {partial} could not be removed" if partial.exists() else before


class _Interrupts:
    """A context that SIGINT and SIGTERM end like Ctrl-C, once; while held they wait."""

    def __init__(self) -> None:
        self._is_held = self._is_pending = False
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._arrive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """Let signals that come from now on wait for ever."""
        self._is_held = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let signals that come in the body wait for its end."""
        self._is_held = True
        yield
        self._is_held = False
        if self._is_pending:
            self._is_pending = False
            raise KeyboardInterrupt

    def _arrive(self, *_: object) -> None:
        if self._is_held:
            self._is_pending = True
            return
        self._is_held = True  # A second signal must not interrupt the clearing up.
        raise KeyboardInterrupt
