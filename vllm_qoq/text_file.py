"""A check of the text files that a user gives, made before anything that takes long."""

from __future__ import annotations

import codecs
from pathlib import Path

from vllm_qoq.errors import UserError

_PIECE_BYTES = 1 << 20


class TextError(UserError):
    """An error for a file that is no text in UTF-8."""


def check_text(option: str, path: Path) -> None:
    """Raise TextError unless `path`, which `option` names, is a regular file in UTF-8."""
    if not path.exists():
        raise TextError(f"{option} {path}: no such file; give a file with text in UTF-8")
    if not path.is_file():
        raise TextError(f"{option} {path}: not a regular file; give a file with text in UTF-8")
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while True:
            piece = file.read(_PIECE_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                raise TextError(
                    f"{option} {path}: not UTF-8 at byte {done - pending + error.start} "
                    f"({error.reason}); convert it, for example with iconv -f latin1 -t utf-8"
                ) from None
            if not piece:
                return
            done += len(piece)
