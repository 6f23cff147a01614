"""The trace of one engine: every routing decision as a line of JSON."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from vllm.logger import init_logger

from vllm_qoq.routing.table import RoutingError
from vllm_qoq.serving.options import NAMESPACE

logger = init_logger("vllm." + __name__)


class Trace:
    """Appends lines to a file that other engines, too, may append to.

    A line is one write in append mode, so lines of several engines do not mix, and each says which
    engine (its data-parallel index) and which process wrote it, and when (seconds since 1970).
    """

    def __init__(self, path: str, engine: int) -> None:
        """Open the file; RoutingError where that cannot be done."""
        self._path = path
        self._writer = {"engine": engine, "pid": os.getpid()}
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        try:
            # A pipe that nobody reads would wait forever.
            self._file: int | None = os.open(path, flags | os.O_NONBLOCK, 0o644)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise RoutingError(
                f"--additional-config: {NAMESPACE}.trace is {path!r}, which cannot be written: "
                f"{reason}; name a file in a folder that exists and is writable"
            ) from None

    def write(self, decision: dict[str, Any]) -> None:
        """Append one decision; one that cannot be written ends the trace, and never a request."""
        if self._file is None:
            return
        line = (json.dumps(self._writer | {"time": time.time()} | decision) + "\n").encode()
        try:
            written = os.write(self._file, line)
        except OSError as error:
            self._end(str(error.strerror))
            return
        if written < len(line):
            self._end("the last line is cut off")

    def close(self) -> None:
        """End the trace."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _end(self, reason: str) -> None:
        logger.error("The trace ends here, %s cannot be written: %s", self._path, reason)
        self.close()
