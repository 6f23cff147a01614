"""Processes that are measured, each in a session of its own, and what their logs say."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from vllm_qoq.bench.serving import guard
from vllm_qoq.engine_log import last_cause
from vllm_qoq.errors import printable

_LONGEST_REASON = 300
# The last line of a command that was given options that it does not have.
_USAGE = re.compile(r"^[\w. -]+: (error): (.+)")
_LOADED = re.compile(r"[Mm]odel loading took ([\d.]+) GiB")


@contextmanager
def session(
    command: list[str], log: IO[str], env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in a session of its own, and end all of the session with the block.

    vLLM's engine is a child of that process, which may outlive it. The session ends, too, when this
    process is killed (`guard`).
    """
    process = subprocess.Popen(
        [sys.executable, "-I", guard.__file__, *command],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        start_new_session=True,
        env=env,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin:
            process.stdin.close()


def reason(log: Path, code: int) -> str:
    """Find in a log why the process that wrote it ended with `code`."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    usage = [f"{match[1]}: {match[2]}" for line in lines if (match := _USAGE.search(line))]
    found = last_cause(lines) or (usage[-1] if usage else None)
    if found is None:
        return f"the process ended with {code}; its log is {log}"
    return printable(found[:_LONGEST_REASON])


def weights_gib(log: Path) -> float | None:
    """Read from vLLM's log how many GiB the weights took; None where it does not say."""
    if not log.exists():
        return None
    said = _LOADED.search(log.read_text(encoding="utf-8", errors="replace"))
    return float(said[1]) if said else None
