"""Why a sample has no caption, and why a job cannot run."""

from __future__ import annotations

import re
from typing import Literal

from vllm_qoq.errors import UserError

Kind = Literal[
    "no_image",
    "not_an_image",
    "damaged",
    "too_large",
    "duplicate_key",
    "bad_name",
    "refused",
    "engine",
    "no_key",
    "repeated",
]
"""Kind of a sample without a caption, and of an image that is of no sample.

no_image       it has no file with the ending of an image
not_an_image   the file is in none of the formats that are read
damaged        the image cannot be decoded, or the shard ends within it
too_large      it has more bytes or more pixels than are read
duplicate_key  an earlier sample of the shard has the key
bad_name       its name is not UTF-8
refused        the engine does not take it, for example because its prompt would be too long
engine         the engine gave it up
no_key         an image whose name gives no key, and so no sample
repeated       a second image of one name in a sample
"""


_ADDRESS = re.compile(" at 0x[0-9a-fA-F]+")


class CaptionError(UserError):
    """A job that cannot begin or go on; the message says why, and what to do."""


class Uncaptioned(Exception):
    """A sample that gets no caption.

    kind  what is wrong
    why   the reason in words, for people, without the addresses that a library puts into it, so
          that each run has the same
    """

    def __init__(self, kind: Kind, why: str) -> None:
        super().__init__(kind, why)
        self.kind, self.why = kind, _ADDRESS.sub("", why)
