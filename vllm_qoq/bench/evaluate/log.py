"""The log of the processes that engines run in, which a quiet run shows only where one fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from tempfile import NamedTemporaryFile
from typing import Any


@contextmanager
def pool_settings(is_quiet: bool) -> Iterator[dict[str, Any]]:
    """Give the settings of a pool of processes whose output is held back if `is_quiet`.

    It goes to stderr where the body fails.
    """
    settings: dict[str, Any] = {"mp_context": get_context("spawn")}
    if not is_quiet:
        yield settings
        return
    with NamedTemporaryFile(prefix="vllm-qoq-") as log:
        try:
            yield settings | {"initializer": _print_into, "initargs": (log.name,)}
        except BaseException:
            print(log.read().decode(errors="replace"), file=sys.stderr, flush=True)
            raise


def _print_into(name: str) -> None:
    """Send all that this process and its children print into the file `name`."""
    file = os.open(name, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)
