"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vllm_qoq.quantize.clock import Clock


@contextmanager
def progress(label: str, total: int, quiet: bool) -> Iterator[Callable[[], object]]:
    """Call what this yields after each of `total` pieces."""
    if quiet or not sys.stderr.isatty():
        yield Clock(label, total, quiet)
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=label) as bar:
        yield bar.update


def say(text: str) -> None:
    """A line on stderr; a bar stays below it."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)
