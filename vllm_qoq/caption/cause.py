"""Why vLLM did not start, from the log of its processes.

Its engine core, and that one's workers, are processes of their own. The error that reaches us says
no more than that the cause was printed.
"""

from __future__ import annotations

import re
from pathlib import Path

from vllm_qoq.errors import reason

_ELSEWHERE = "root cause"
# `(Worker_TP0 pid=7) ERROR 11-28 07:43:50 [multiproc_executor.py:953] torch.OutOfMemoryError: ...`
_LAST_OF_TRACEBACK = re.compile(
    r"(?:\([^()]*\) )*(?:ERROR [^\[]*\[[^\]]*\] )?(?P<error>(?:\w+\.)*\w*(?:Error|Exception): .+)"
)


def cause(error: Exception, log: Path | None) -> str:
    """Say why vLLM raised an error at its start, on one line of at most 300 characters.

    log  what all processes of this start have printed; None where it was not kept

    Where the error refers to a cause elsewhere, that is the last error in the log that does not.
    """
    if _ELSEWHERE not in str(error) or log is None:
        return reason(error)
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            match = _LAST_OF_TRACEBACK.match(line)
            if match is not None and _ELSEWHERE not in line:
                error = RuntimeError(match["error"])
    return reason(error)
