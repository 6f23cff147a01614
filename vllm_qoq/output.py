"""Keeping stdout for a command's result."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def stdout_for(descriptor: int) -> Iterator[TextIO]:
    """Send what libraries and their processes print to `descriptor`, the result to real stdout."""
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(descriptor, 1)
    try:
        with open(real, "w", closefd=False) as out:
            yield out
    finally:
        sys.stdout.flush()
        # Not undone: processes that vLLM leaves to the end of this one print there, too.
        os.close(real)
