"""The errors that a user can mend, and how their messages are made."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

_LONGEST = 100
_LONGEST_REASON = 300


class UserError(ValueError):
    """An error for a request that cannot be met: the message says why, and what to do instead.

    Names come out of untrusted files, so what a terminal would obey is escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class FormatError(UserError):
    """An error for a checkpoint that breaks the contract: it names the file, tensor or key."""


class EngineError(RuntimeError):
    """A `UserError` that is raised while vLLM makes its configuration.

    pydantic makes that configuration, and wraps a ValueError into a page of its own. This one
    passes, so that its message is the last line that `vllm serve` and `LLM()` write.
    """


@contextmanager
def as_engine_error() -> Iterator[None]:
    """Give a UserError the type that pydantic lets pass."""
    try:
        yield
    except UserError as error:
        raise EngineError(str(error)) from None


def printable(text: str) -> str:
    """Put `text` on one line, with control characters and the like as escape sequences."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object) -> str:
    """Quote a value from a file or a command line: at most 100 characters of its `repr`."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _LONGEST
    short.maxlevel = 3
    text = short.repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def reason(error: BaseException) -> str:
    """Put what a library's error says on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 3]}..."


def one_line(error: ValidationError, root: str) -> str:
    """Put the first finding of a ValidationError as `key: what is wrong; what to do`.

    root  what the keys are in, which comes before them
    """
    finding = error.errors(include_url=False)[0]
    key = ".".join((root, *(_part(part) for part in finding["loc"])))
    message = finding["msg"].removeprefix("Value error, ")
    message = message.partition(" or instance of ")[0]  # our classes, which no file can hold
    if finding["type"] == "value_error":  # raised by our validators, and complete
        return f"{key}: {message}"
    if finding["type"] == "missing":
        return f"{key}: {message}; add it"
    if finding["type"] == "extra_forbidden":
        return f"{key}: {message} ({shown(finding['input'])}); check its spelling or remove it"
    return f"{key}: {message}, but it is {shown(finding['input'])}; change it"


def _part(part: object) -> str:
    """Shorten a key or an index on the way to a finding, because keys come out of files."""
    text = str(part)
    return text if len(text) <= 60 else f"{text[:57]}..."
