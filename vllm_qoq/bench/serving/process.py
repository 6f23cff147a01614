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
from vllm_qoq.errors import printable

_LONGEST_REASON = 300
# Lines of a log that say only that something above them failed.
_FOLLOWING = re.compile(r"Engine core initialization failed|EngineDeadError|root cause")
_ERROR = re.compile(r"(?:^|\s)([\w.]*(?:Error|Exception|Refusal)): (.+)")
# pydantic says on the lines below which argument is meant, and what is wrong with it.
_VALIDATION, _END_OF_VALIDATION, _LINES_OF_VALIDATION = "validation error", " [type=", 2
_PROCESS = re.compile(r"^\([^)]*\) ")
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
    found = [
        (number, match)
        for number, line in enumerate(lines)
        if (match := _ERROR.search(line) or _USAGE.search(line))
    ]
    causes = [one for one in found if not _FOLLOWING.search(one[1][0])] or found
    if not causes:
        return f"the process ended with {code}; its log is {log}"
    number, match = causes[-1]
    text = f"{match[1]}: {match[2]}"
    if _VALIDATION in match[2]:
        below = lines[number + 1 : number + 1 + _LINES_OF_VALIDATION]
        text = " ".join((text, *(_PROCESS.sub("", line).strip() for line in below)))
        text = text.partition(_END_OF_VALIDATION)[0]
    return printable(text[:_LONGEST_REASON])


def weights_gib(log: Path) -> float | None:
    """Read from vLLM's log how many GiB the weights took; None where it does not say."""
    if not log.exists():
        return None
    said = _LOADED.search(log.read_text(encoding="utf-8", errors="replace"))
    return float(said[1]) if said else None
