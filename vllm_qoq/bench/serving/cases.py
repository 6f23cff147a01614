"""The cases of `bench serving`: lengths of prompts and answers, and batch sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vllm_qoq.bench import BenchError


class Lengths(NamedTuple):
    """The tokens of every prompt and of every answer."""

    prompt: int
    new: int

    def __str__(self) -> str:
        return f"{self.prompt}/{self.new}"

    @property
    def tokens(self) -> int:
        """The tokens of a finished request."""
        return self.prompt + self.new


LENGTHS = (Lengths(1024, 512),)
"""What is measured unless the user says otherwise."""
FULL = "full"
"""The batch that fills the pool of the KV cache."""
BATCHES = ("1", "16", "64", "256", FULL)
MOST = 2048
"""The largest batch, unless the user says otherwise."""
# Batches for which CUDA graphs are captured, for all formats alike; a full batch is rounded down to
# one of them, so that no step is padded.
_CAPTURED = (
    *(1, 2, 4),
    *range(8, 128, 8),
    *range(128, 256, 16),
    *range(256, 512, 32),
    *range(512, 1024, 64),
    *range(1024, 2049, 256),
)


def captured(batches: Iterable[str], most: int) -> list[int]:
    """List the batch sizes for which graphs are captured, in ascending order."""
    asked = {int(batch) for batch in batches if batch != FULL}
    if FULL in batches:
        asked |= {most, *_CAPTURED}
    return sorted(batch for batch in asked if batch <= most)


def fitting(
    batches: Sequence[str], sizes: Sequence[int], lengths: Lengths, pool: int, block: int
) -> list[int]:
    """List the batches that a pool holds to the end, the largest first.

    sizes  the sizes with a graph, ascending
    pool   blocks of the KV cache that are free for requests, of `block` tokens each

    The largest comes first because it is what a run that is cut short should know.
    """
    largest = pool // -(-lengths.tokens // block)
    found = {int(batch) for batch in batches if batch != FULL and int(batch) <= largest}
    full = [size for size in sizes if size <= largest]
    if FULL in batches and full:
        found.add(full[-1])
    return sorted(found, reverse=True)


def check_batches(batches: Sequence[str], most: int) -> None:
    """Raise BenchError for a batch above `most`, which engines are started for."""
    for batch in batches:
        if batch != FULL and int(batch) > most:
            raise BenchError(f"--batches {batch} is more than --max-batch {most}; raise it")
