"""`--max_shard_size` means `--max-shard-size`: vLLM takes both spellings, so users type both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def kebab_case(arguments: Iterable[str]) -> list[str]:
    """The arguments with `_` as `-` in the names of long options; values stay as they are."""
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
