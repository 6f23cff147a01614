"""The reason why an engine does not start, made the last line that a person reads.

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
    """Make this front end write what an engine refused, when it ends by an error."""
    atexit.register(_repeat, stem, os.getpid())


def leave(stem: str, front_end: int) -> None:
    """Make this process leave what it refuses for the process `front_end`.

    Call it where a model is built, and not before, because vLLM sets up the log of a new process
    late, and drops other handlers.
    """
    logger = logging.getLogger("vllm")
    if os.getpid() == front_end:  # the front end sees the error itself
        return
    for handler in [handler for handler in logger.handlers if isinstance(handler, _Leave)]:
        logger.removeHandler(handler)  # it belongs to the engine before
    logger.addHandler(_Leave(_file(stem)))


class _Leave(logging.Handler):
    """A handler that sees the errors that vLLM logs."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        """Write the message of a UserError to the file; the first of several stays."""
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, UserError):
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
