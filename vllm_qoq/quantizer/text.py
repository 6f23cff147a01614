"""Cutting of calibration and evaluation text into pieces of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vllm_qoq.errors import shown
from vllm_qoq.quantizer import QuantizeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


def pieces(
    path: Path, tokenizer: PreTrainedTokenizerBase, seqlen: int, samples: int | None
) -> list[list[int]]:
    """Cut a text file into pieces of `seqlen` token ids, of which up to `samples` are kept.

    They are taken from all over the file; None keeps all. There are no special tokens, as in
    `vllm_qoq.bench.perplexity`. Raises QuantizeError if the text is too short.
    """
    tokens = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    starts = list(range(0, len(tokens) - seqlen + 1, seqlen))
    if not starts:
        raise QuantizeError(
            f"{path}: {len(tokens)} tokens, fewer than one piece of {seqlen}; give a longer text "
            "or a smaller --seqlen"
        )
    if samples is not None:
        starts = spread(starts, samples)
    return [tokens[start : start + seqlen] for start in starts]


def check_tokens(
    path: Path, found: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, rows: int
) -> None:
    """Raise QuantizeError for a token in the pieces of `path` beyond the embedding's `rows`."""
    if (last := max(map(max, found), default=0)) >= rows:
        raise QuantizeError(
            f"{path}: has {shown(tokenizer.decode([last]))}, which is token {last}, but the "
            f"embedding has {rows} rows; take it out of the text"
        )


def spread(values: list[T], count: int) -> list[T]:
    """Take `count` of `values` from all over the list, or all where there are no more."""
    if len(values) <= count:
        return values
    return [values[i * len(values) // count] for i in range(count)]
