"""Care for stdout and stderr: open, fit for any name, and kept for what belongs there."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

_REFUSED = 2


@contextmanager
def stdout_for(descriptor: int) -> Iterator[TextIO]:
    """Send what libraries and their processes print to `descriptor`; yields the real stdout."""
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(descriptor, 1)
    try:
        with open(real, "w", closefd=False, errors="backslashreplace") as out:
            yield out
    finally:
        sys.stdout.flush()
        # The redirection stays: processes that vLLM leaves to the end print there, too.
        os.close(real)


def guarded(run: Callable[[], int]) -> int:
    """Call a command's `run`; the result is the exit code of the program.

    Refuses, with status 2, to begin without stdout and stderr, with arguments that cannot be
    printed, and to end as if all was well when stdout has not got everything.
    """
    if not _are_open():
        return _REFUSED  # there is nobody to tell
    for argument in sys.argv:
        try:
            argument.encode()
        except UnicodeEncodeError:
            print(f"error: {argument}: is not UTF-8; rename that file or folder", file=sys.stderr)
            return _REFUSED
    try:
        code = run()
    except SystemExit:  # argparse, after --help, --version or a usage error
        if not _is_written():
            return _REFUSED
        raise
    return code if _is_written(is_told=code == _REFUSED) else _REFUSED


def _are_open() -> bool:
    """Whether there is a stdout and a stderr; makes them print what their encoding lacks.

    Where one is closed, the next file that is opened would take its place.
    """
    if sys.stdout is None or sys.stderr is None:
        return False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return True


def _is_written(is_told: bool = False) -> bool:
    """Whether all of stdout has reached its reader. If not, what is left is thrown away.

    is_told  whether stderr has the reason already
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python flushes once more at its end, and would end in a traceback.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if not is_told:
            print(
                f"error: stdout: {error.strerror}, so the result was not printed; read all of it "
                "or send it to a file",
                file=sys.stderr,
            )
        return False
    return True
