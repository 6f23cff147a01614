"""Why vLLM failed, from the log of its processes.

Its engine core, and that one's workers, are processes of their own. The error that reaches us says
no more than that the cause was printed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vllm_qoq.errors import reason

# `(Worker_TP0 pid=7) ERROR 11-28 07:43:50 [multiproc_executor.py:953] torch.OutOfMemoryError: ...`
_PROCESS = r"(?:\([^()]*\) )*(?:ERROR (?:[^\[]*\[[^\]]*\] )?)?(?:\[rank\d+\]: )?"
_ERROR = re.compile(_PROCESS + r"(?P<error>(?:\w+\.)*\w*(?:Error|Exception|Refusal): .+)")
# Errors that say only that something above them failed.
_FOLLOWING = re.compile(r"Engine core initialization failed|EngineDeadError|root cause")
# pydantic says on the lines below which argument is meant, and what is wrong with it.
_VALIDATION, _END_OF_VALIDATION, _LINES_OF_VALIDATION = "validation error", " [type=", 2


def last_cause(lines: Sequence[str]) -> str | None:
    """Find the last error in a log that is not the consequence of another; None without any.

    Where there are only consequences, the last of them.
    """
    found = [
        (number, match["error"])
        for number, line in enumerate(lines)
        if (match := _ERROR.match(line)) is not None
    ]
    causes = [one for one in found if not _FOLLOWING.search(one[1])] or found
    if not causes:
        return None
    number, text = causes[-1]
    if _VALIDATION not in text:
        return text
    below = lines[number + 1 : number + 1 + _LINES_OF_VALIDATION]
    text = " ".join((text, *(re.sub(_PROCESS, "", line, count=1).strip() for line in below)))
    return text.partition(_END_OF_VALIDATION)[0]


def cause(error: Exception, log: Path | None) -> str:
    """Say why vLLM raised an error at its start, on one line of at most 300 characters.

    log  what all processes of this start have printed; None where it was not kept
    """
    if _FOLLOWING.search(str(error)) is None or log is None:
        return reason(error)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = last_cause(lines)
    return reason(error if found is None else RuntimeError(found))
