"""Runs a command, and ends it with who asked for it: `python guard.py COMMAND...`.

Stdin is a pipe from the process that asked. When that process ends, by whatever signal, the pipe
does, and with it all of this session: the command, and the engines that it started.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

_POLL_SECONDS = 0.2


def main(command: list[str]) -> int:
    """Run a command to its end; returns its exit code, or 128 and the signal that ended it."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while child.poll() is None:
        if select.select([sys.stdin], [], [], _POLL_SECONDS)[0]:
            os.killpg(0, signal.SIGKILL)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
