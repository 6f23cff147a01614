"""Running of a command: what it raises becomes a message and an exit code.

The exit codes are 0 for done, 1 for a check that failed, 2 for refused or bad usage, and 130 for
interrupted.
"""

from __future__ import annotations

import argparse
import errno
import signal
import sys

from vllm_qoq.errors import EngineError, UserError, printable

_REMEDIES = {
    errno.ENOSPC: "make room there or choose another disk",
    errno.EDQUOT: "make room in your quota or choose another disk",
    errno.EFBIG: "lower --max-shard-size, or raise the limit (ulimit -f)",
    errno.EACCES: "get the right to it or choose another place",
    errno.EROFS: "choose another place",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.ELOOP: "remove the circle of links",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "raise the limit (ulimit -n)",
}
_LONGEST_PATH = 1000


def run(args: argparse.Namespace) -> int:
    """Call the handler `args.run` and turn what it raises into a message and an exit code."""
    try:
        return int(args.run(args))
    except (UserError, EngineError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {printable(_message(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # A second one must not interrupt the end.
        state = str(interrupt)
        print(f"interrupted{'; ' if state else ''}{printable(state)}", file=sys.stderr)
        return 130


def _message(error: Exception) -> str:
    """Describe an error; one of the system with the file and what to do."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    files = " -> ".join(
        str(file)[:_LONGEST_PATH] for file in (error.filename, error.filename2) if file is not None
    )
    remedy = _REMEDIES.get(error.errno)
    text = f"{files}: {error.strerror}" if files else str(error.strerror)
    return f"{text}; {remedy}" if remedy else text
