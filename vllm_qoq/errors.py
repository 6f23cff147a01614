"""What all errors that a user can mend have in common."""

from __future__ import annotations

import reprlib

_LONGEST = 100


class UserError(ValueError):
    """Something that was asked for cannot be done. The message says why, and what to do instead."""


def shown(value: object) -> str:
    """`repr` of a value from a file or a command line, at most 100 characters of it."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _LONGEST
    short.maxlevel = 3
    text = short.repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
