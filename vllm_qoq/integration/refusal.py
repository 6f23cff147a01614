"""Makes the reason why an engine does not start the last line that a person reads.

An engine and its workers are processes of their own. What they refuse stands in the middle of the
log, and the process that was started ends with "Engine core initialization failed". So an engine
leaves the message beside the other files of its front end (`shared_files`), which repeats it when
it ends by an error.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from pathlib import Path

from vllm_qoq.errors import UserError, printable

_LONGEST = 4000  # bytes


def repeat_at_exit(stem: str) -> None:
    """In the front end: write what an engine refused when this process ends by an error."""
    _leave(stem, front_end=os.getpid())  # forks inherit it
    atexit.register(_repeat, stem, os.getpid())


def leave_in_spawned(stem: str) -> None:
    """In an engine that the front end has started anew: leave what is refused."""
    _leave(stem, front_end=None)


def _leave(stem: str, front_end: int | None) -> None:
    logger = logging.getLogger("vllm")
    for handler in [handler for handler in logger.handlers if isinstance(handler, _Leave)]:
        if handler.path == _file(stem):  # a copy of the configuration
            return
        logger.removeHandler(handler)  # of the engine before
    logger.addHandler(_Leave(_file(stem), front_end))


class _Leave(logging.Handler):
    """Sees the errors that vLLM logs, in every process but the front end."""

    def __init__(self, path: Path, front_end: int | None) -> None:
        super().__init__(logging.ERROR)
        self.path, self._front_end = path, front_end

    def emit(self, record: logging.LogRecord) -> None:
        """Leave the message of a UserError; the first of several stays."""
        error = record.exc_info[1] if record.exc_info else None
        if os.getpid() == self._front_end or not isinstance(error, UserError):
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(self.path, flags, 0o600), "w", encoding="utf-8") as file:
                file.write(str(error))
        except OSError:  # another rank was first, or the front end is gone
            return


def _repeat(stem: str, front_end: int) -> None:
    last = getattr(sys, "last_value", None)  # what this process dies of
    if os.getpid() != front_end or last is None:
        return
    try:
        with _file(stem).open("rb") as file:
            message = printable(file.read(_LONGEST).decode(errors="replace"))
    except OSError:
        return
    if message not in str(last):
        print(f"error: {message}", file=sys.stderr, flush=True)


def _file(stem: str) -> Path:
    return Path(f"{stem}-refusal")
