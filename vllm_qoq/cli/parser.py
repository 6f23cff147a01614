"""The parser of the command line: errors are one line, and options have both spellings."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import NoReturn

from vllm_qoq.errors import printable

_LONGEST = 1000


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that repeats at most 1000 characters, none of which a terminal obeys."""

    def error(self, message: str) -> NoReturn:
        """Print the message and end the program, as argparse does."""
        text = printable(message)
        super().error(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}...")


Commands = argparse._SubParsersAction
"""The type that `ArgumentParser.add_subparsers` returns, to which commands are added."""


def kebab_case(arguments: Iterable[str]) -> list[str]:
    """Write `_` as `-` in the names of long options; values stay as they are.

    vLLM takes `--max_model_len` for `--max-model-len`, so users type both.
    """
    return list(_rewritten(arguments))


def _rewritten(arguments: Iterable[str]) -> Iterator[str]:
    only_values = False
    for argument in arguments:
        # By convention, nothing after a bare `--` is an option.
        only_values = only_values or argument == "--"
        if only_values or not argument.startswith("--"):
            yield argument
        else:
            name, equals, value = argument.partition("=")
            yield name.replace("_", "-") + equals + value
