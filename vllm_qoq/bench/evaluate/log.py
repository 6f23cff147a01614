"""The processes that engines run in: their log, which a quiet run shows only where one fails."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from tempfile import NamedTemporaryFile
from typing import Any


@contextmanager
def pool_settings(is_quiet: bool) -> Iterator[dict[str, Any]]:
    """Give the settings of a pool of processes whose output is held back if `is_quiet`.

    It goes to stderr where the body fails. The processes end with this one, by whatever signal.
    """
    settings = {"mp_context": get_context("spawn"), "initializer": _begin, "initargs": (None,)}
    if not is_quiet:
        yield settings
        return
    with NamedTemporaryFile(prefix="vllm-qoq-") as log:
        try:
            yield settings | {"initargs": (log.name,)}
        except BaseException:
            print(log.read().decode(errors="replace"), file=sys.stderr, flush=True)
            raise


def _begin(log: str | None) -> None:
    """Prepare a process of the pool; what it prints goes into the file `log`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if log is not None:
        _print_into(log)


def _end_with_parent() -> None:
    """End this process when the one that started it ends; a pool's would wait for work forever."""
    if (parent := parent_process()) is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)


def _print_into(name: str) -> None:
    """Send all that this process and its children print into the file `name`."""
    file = os.open(name, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)
