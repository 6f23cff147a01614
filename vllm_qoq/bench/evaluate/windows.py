"""The pieces of a text that are scored, as in llama.cpp's `perplexity`.

The text is tokenized once without special tokens and cut into consecutive windows of n tokens; the
rest is dropped. Where the tokenizer begins a text with a token of its own (BOS), that takes the
place of each window's first token. The tokens of the second half are scored, from n / 2 + 1 on, so
that each has a long context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_qoq.bench import BenchError


@dataclass(frozen=True)
class Windows:
    """Windows of token ids, all of one length; those at `first` + 1 and after are scored."""

    tokens: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return len(self.tokens[0])

    @property
    def first(self) -> int:
        """The position whose logits are the first to be scored."""
        return self.length // 2

    def context(self, index: int) -> tuple[int, ...]:
        """The tokens of a window before those that are scored."""
        return self.tokens[index][: self.first + 1]

    @property
    def scored(self) -> int:
        """Scored tokens of a window."""
        return self.length - 1 - self.first

    def targets(self, index: int) -> tuple[int, ...]:
        """The scored tokens of a window."""
        return self.tokens[index][self.first + 1 :]


def cut(ids: Sequence[int], bos: int | None, length: int, most: int | None) -> Windows:
    """Cut token ids into windows of `length`, of which up to `most` are taken from all over.

    bos  the token that takes the place of each window's first
    """
    starts = list(range(0, len(ids) - length + 1, length))
    if len(starts) < 2:
        raise BenchError(
            f"--text has {len(ids)} tokens, fewer than two windows of {length}, which an error of "
            "the mean needs; give a longer text or a smaller --seqlen"
        )
    if most is not None and most < len(starts):
        starts = [starts[i * len(starts) // most] for i in range(most)]
    head = () if bos is None else (bos,)
    return Windows(tuple((*head, *ids[start + len(head) : start + length]) for start in starts))


def begins_with(tokenizer: Any) -> int | None:
    """The token with which the tokenizer begins a text; None where it adds none."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    with_special = tokenizer("a").input_ids
    without = tokenizer("a", add_special_tokens=False).input_ids
    return int(bos) if with_special[:1] == [bos] and without[:1] != [bos] else None
