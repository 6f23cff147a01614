"""Regular expressions of strangers, matched as vLLM matches them, in bounded time."""

from __future__ import annotations

import time
from functools import lru_cache

import regex  # vLLM matches with it, and matching with the standard library cannot be stopped

from vllm_qoq.errors import FormatError

_SECONDS = 0.2
_TOTAL_SECONDS = 5.0
_SLOW_SECONDS = 0.001
_LONGEST = 4096
_refused: set[str] = set()
_slow = 0.0


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches at the beginning of `name`, as `re.match`."""
    return _run(pattern, name, "match")


def occurs(pattern: str, name: str) -> bool:
    """Whether `pattern` matches anywhere in `name`, as `re.search`."""
    return _run(pattern, name, "search")


def _run(pattern: str, name: str, how: str) -> bool:
    """Match, or raise FormatError if this pattern, or all so far together, take too long."""
    global _slow
    if pattern in _refused:
        raise _too_slow(pattern, name)
    compiled = _compiled(pattern)
    start = time.perf_counter()
    try:
        found = getattr(compiled, how)(name, timeout=_SECONDS) is not None
    except TimeoutError:
        _refused.add(pattern)
        raise _too_slow(pattern, name) from None
    taken = time.perf_counter() - start
    if taken > _SLOW_SECONDS:
        _slow += taken
        if _slow > _TOTAL_SECONDS:
            raise _too_slow(pattern, name)
    return found


def _too_slow(pattern: str, name: str) -> FormatError:
    return FormatError(
        f"config.json: quantization_config: the pattern {pattern[:80]!r} takes too long for "
        f"{name}; write it without nested repetitions"
    )


@lru_cache(maxsize=16_384)
def _compiled(pattern: str) -> regex.Pattern[str]:
    if len(pattern) > _LONGEST:
        raise FormatError(
            f"config.json: quantization_config: a pattern of {len(pattern)} characters begins with "
            f"{pattern[:40]!r}; write at most {_LONGEST}"
        )
    try:
        return regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError) as error:
        raise FormatError(
            f"config.json: quantization_config: {pattern[:80]!r} is no regular expression "
            f"({error}); mend it"
        ) from None
