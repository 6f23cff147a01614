"""The command line's parser: its errors are one line, whatever was typed."""

from __future__ import annotations

import argparse
from typing import NoReturn

from vllm_qoq.errors import printable

_LONGEST = 1000


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that repeats at most 1000 characters, none of which a terminal obeys."""

    def error(self, message: str) -> NoReturn:
        text = printable(message)
        super().error(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}...")
