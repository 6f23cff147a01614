"""The result of an evaluation as Markdown."""

from __future__ import annotations

from vllm_qoq.bench.evaluate.job import Evaluation, Row
from vllm_qoq.bench.evaluate.scores import Estimate
from vllm_qoq.checkpoint.kv_config import described
from vllm_qoq.markdown import markdown_table
from vllm_qoq.progress import human_bytes

_HEAD = ["Set", "KV cache", "weights", "KL", "same top token", "perplexity", "change"]


def text(found: Evaluation) -> str:
    """Lay out the table, with what was measured above it."""
    generated = (
        f" Each made {found.generated} tokens of the first half of every window, always the "
        "likeliest; the last column says how many before the first that differs."
    ) * (found.generated > 0)
    return (
        f"{found.checkpoint} against {found.against}: {found.scored_tokens} tokens of "
        f"{found.text}, the second halves of {found.windows} windows of {found.seqlen}. KL in nats "
        "a token from the float model in transformers, whose perplexity is "
        f"{found.rows[0].score.float_perplexity:.4f}; changes are of the perplexity, and errors "
        f"standard errors over the windows, which are paired. Quantized caches were read in "
        f"steps of {found.chunk} tokens.{generated}\n\n"
        + markdown_table(
            [*_HEAD, "same greedy tokens"] if found.generated else _HEAD,
            [_cells(row) for row in found.rows],
        )
    )


def _cells(row: Row) -> list[str]:
    score = row.score
    return [
        row.set_name,
        described(row.kv_bits),
        human_bytes(row.weight_bytes),
        f"{score.divergence.value:.5f} ± {score.divergence.error:.5f}",
        _percent(score.agreement),
        f"{score.perplexity:.4f}",
        _percent(score.log_ratio, sign="+"),
        *(f"{same.value:.1f} ± {same.error:.1f}" for same in (score.greedy_tokens,) if same),
    ]


def _percent(found: Estimate, sign: str = "") -> str:
    """Write a share, or the logarithm of a ratio near 1, in percent with its error."""
    return f"{100 * found.value:{sign}.2f} ± {100 * found.error:.2f} %"
