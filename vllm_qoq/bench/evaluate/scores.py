"""What is measured of every scored token, and means over windows with their errors.

p is the float model's distribution of the next token, q the quantized one's, both over the whole
vocabulary. The windows of both are the same, so that errors are those of paired differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WindowScore:
    """Means over the scored tokens of one window.

    divergence     KL(p, q) = sum p (log p - log q), nats
    agreement      share of tokens for which p and q have the same likeliest token
    loss           -log q of the text's token, nats
    float_loss     -log p of it
    greedy_tokens  how many tokens both models make of the window's first half, each the likeliest,
                   before the first that differs; None where none were made
    """

    divergence: float
    agreement: float
    loss: float
    float_loss: float
    greedy_tokens: int | None = None


@dataclass(frozen=True)
class Estimate:
    """A mean over windows, and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Score:
    """The result of one set with one precision of the KV cache.

    log_ratio  ln of the perplexity over the float model's; its error is that of the paired windows
    """

    divergence: Estimate
    agreement: Estimate
    perplexity: float
    float_perplexity: float
    log_ratio: Estimate
    greedy_tokens: Estimate | None = None


def score_window(
    float_logits: torch.Tensor, logits: torch.Tensor, targets: Sequence[int]
) -> WindowScore:
    """Compare logits [tokens, vocabulary] of both models with the tokens that follow."""
    log_p = float_logits.float().log_softmax(dim=-1)
    log_q = logits.to(log_p.device).float().log_softmax(dim=-1)
    following = torch.tensor(targets, device=log_p.device)[:, None]
    # Where p is 0, q may be 0, too.
    terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))
    return WindowScore(
        divergence=float(terms.sum(dim=-1, dtype=torch.float64).mean()),
        agreement=float((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).double().mean()),
        loss=-float(log_q.gather(1, following).double().mean()),
        float_loss=-float(log_p.gather(1, following).double().mean()),
    )


def same_tokens(expected: Sequence[int], found: Sequence[int]) -> int:
    """Count the tokens before the first that differs."""
    pairs = zip(expected, found, strict=True)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), len(expected))


def combine(windows: Sequence[WindowScore]) -> Score:
    """Combine the scores of two or more windows."""
    greedy = [window.greedy_tokens for window in windows if window.greedy_tokens is not None]
    return Score(
        divergence=_mean([window.divergence for window in windows]),
        agreement=_mean([window.agreement for window in windows]),
        perplexity=_exp(_mean([window.loss for window in windows]).value),
        float_perplexity=_exp(_mean([window.float_loss for window in windows]).value),
        log_ratio=_mean([window.loss - window.float_loss for window in windows]),
        greedy_tokens=_mean(greedy) if greedy else None,
    )


def _mean(values: Sequence[float]) -> Estimate:
    count = len(values)
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count))


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
