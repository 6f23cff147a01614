"""Several checkpoints of one model on several texts: the numbers, and their tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_qoq.bench.evaluate.scores import Estimate, Score
from vllm_qoq.checkpoint.kv_config import Bits, described
from vllm_qoq.markdown import markdown_table

KV_BITS: tuple[Bits, ...] = (16, 8, "k8v4", 4)
"""The columns of a table."""
_ENDS: tuple[Bits, ...] = (16, 4)


@dataclass(frozen=True)
class Measured:
    """The score of one kind of weights, with one precision of the KV cache, on one text."""

    name: str
    kv_bits: Bits
    text: str
    score: Score

    def document(self) -> dict[str, Any]:
        """Make the JSON document."""
        return asdict(self)

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Measured:
        """Read what `document` made."""
        score: dict[str, Any] = {
            key: Estimate(**value) if isinstance(value, dict) else value
            for key, value in document["score"].items()
        }
        return cls(**{**document, "score": Score(**score)})


def by_kv(rows: Sequence[Measured], name: str, text: str) -> dict[Bits, Score]:
    """Find the scores of one kind of weights on one text, by the precision of the KV cache."""
    return {row.kv_bits: row.score for row in rows if (row.name, row.text) == (name, text)}


def names(rows: Sequence[Measured]) -> list[str]:
    """Name all kinds of weights, in their order."""
    return list(dict.fromkeys(row.name for row in rows))


def texts(rows: Sequence[Measured]) -> list[str]:
    """Name all texts, in their order."""
    return list(dict.fromkeys(row.text for row in rows))


def least_ratio(rows: Sequence[Measured], name: str, to: str) -> float | None:
    """Divide the divergences of two kinds of weights with a 16-bit cache, on each text.

    Returns the least of the ratios, or None where not both were measured on any text.
    """
    found = [(by_kv(rows, name, text), by_kv(rows, to, text)) for text in texts(rows)]
    return min(
        (a[16].divergence.value / b[16].divergence.value for a, b in found if 16 in a and 16 in b),
        default=None,
    )


def table(rows: Sequence[Measured], text: str) -> str:
    """Lay out the table of one text; what was not measured has no number.

    KL in nats a token, the share of tokens with the same likeliest next one, the perplexity, and
    how many greedy tokens are the float model's before the first that is not.
    """
    found = {name: by_kv(rows, name, text) for name in names(rows)}
    known = [bits for bits in KV_BITS if any(bits in scores for scores in found.values())]
    ends = [bits for bits in _ENDS if bits in known]
    has_text = any(score.greedy_tokens for scores in found.values() for score in scores.values())
    head = [
        "Weights",
        *(f"KL, {described(bits)}" for bits in known),
        *(f"same top token, {described(bits)}" for bits in ends),
        *(f"perplexity, {described(bits)}" for bits in ends),
        *(f"same greedy tokens, {described(bits)}" for bits in ends if has_text),
    ]
    return markdown_table(
        head,
        [
            [
                name,
                *(_divergence(scores.get(bits)) for bits in known),
                *(_agreement(scores.get(bits)) for bits in ends),
                *(_perplexity(scores.get(bits)) for bits in ends),
                *(_greedy(scores.get(bits)) for bits in ends if has_text),
            ]
            for name, scores in found.items()
            if scores
        ],
    )


def _divergence(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{score.divergence.value:.4f} ± {score.divergence.error:.4f}"


def _agreement(score: Score | None) -> str:
    return "" if score is None else f"{100 * score.agreement.value:.1f} %"


def _perplexity(score: Score | None) -> str:
    return "" if score is None else f"{score.perplexity:.3f}"


def _greedy(score: Score | None) -> str:
    same = None if score is None else score.greedy_tokens
    return "" if same is None else f"{same.value:.1f} ± {same.error:.1f}"
