"""How strongly to smooth: scales whose rounding errors, measured on a few tokens, are least.

Every search tries the scales `a^x / b^y` of a few exponents, with a what is divided by
the scale and b what is multiplied, and keeps the best per block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from vllm_qoq.quantize.evaluate import round_cache
from vllm_qoq.reference import GROUP_SIZE, quantize_per_token

_TINY = 1e-5
_DOWN_EXPONENTS = ((0.0, 0.0), *((x / 10, 1 - x / 10) for x in range(1, 10)))
_KEY_EXPONENTS = ((0.0, 0.0), *((x / 4, y / 4) for x in range(1, 5) for y in range(0, 3)))


def scale(
    divided: torch.Tensor, x: float, multiplied: torch.Tensor | None = None, y: float = 0.0
) -> torch.Tensor:
    """divided^x / multiplied^y, float32, with a geometric mean of 1 so that nothing grows."""
    logarithm = divided.float().clamp_min(_TINY).log() * x
    if multiplied is not None:
        logarithm = logarithm - multiplied.float().clamp_min(_TINY).log() * y
    return (logarithm - logarithm.mean()).exp()


def down_scale(
    inputs: torch.Tensor, largest: torch.Tensor, weight: torch.Tensor, weight_bits: int
) -> torch.Tensor:
    """float32 [K] for the inputs of a layer with weight [N, K], rounded to int8 per token.

    inputs   float [tokens, K], a sample
    largest  float32 [K], of all inputs
    """
    weight = weight.float()
    columns = weight.abs().amax(dim=0)
    exact = inputs.float() @ weight.t()

    def error(candidate: torch.Tensor) -> float:
        codes, token_scale, _ = quantize_per_token(inputs.float() / candidate)
        rounded = _rounded_weight(weight * candidate, weight_bits)
        y = (codes.float() @ rounded.t()) * token_scale[:, None]
        return float((y - exact).square().sum())

    candidates = (scale(largest, x, columns, y) for x, y in _DOWN_EXPONENTS)
    return _best(candidates, error)


def key_scale(
    keys: torch.Tensor, largest_pairs: torch.Tensor, query_pairs: torch.Tensor, bits: int
) -> torch.Tensor:
    """float32 [kv_heads, head_dim / 2] for the pairs of the keys.

    keys           float [tokens, kv_heads, head_dim] before RoPE, a sample
    largest_pairs  float32 [kv_heads, head_dim / 2]: largest magnitude of each pair
    query_pairs    float32 [kv_heads, head_dim / 2]: root mean square of the queries' pairs
    """
    queries = torch.cat((query_pairs, query_pairs), dim=1)

    def error(candidate: torch.Tensor) -> float:
        both = torch.cat((candidate, candidate), dim=1)
        lost = round_cache(keys.float() / both, bits) * both - keys.float()
        return float((lost * queries).square().sum())

    candidates = (scale(largest_pairs, x, query_pairs, y) for x, y in _KEY_EXPONENTS)
    return _best(candidates, error)


def value_scale(values: torch.Tensor, readers: torch.Tensor) -> torch.Tensor:
    """float32 [kv_heads, head_dim] for values that R2 will turn, sqrt(value / reader).

    values   float32 [kv_heads, head_dim]: root mean square
    readers  float32 [kv_heads, head_dim]: norm of the columns of o_proj that read the channel

    R2 spreads the rounding error evenly over a head, so that the output loses
    sum(v^2 / s^2) * sum(s^2 o^2), which by Cauchy and Schwarz is least for this s.
    """
    logarithm = (values.clamp_min(_TINY).log() - readers.clamp_min(_TINY).log()) / 2
    return (logarithm - logarithm.mean(dim=1, keepdim=True)).exp()


def _best(
    candidates: Iterable[torch.Tensor], error: Callable[[torch.Tensor], float]
) -> torch.Tensor:
    return min(candidates, key=error)


def _rounded_weight(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """To the nearest code, in groups of 128 for 4 bits and per row for 8."""
    n, k = weight.shape
    groups = weight.view(n, -1, GROUP_SIZE if bits == 4 else k)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / ((1 << bits) - 1)).clamp_min(1e-10)
    return (((groups - low) / step).round() * step + low).view(n, k)
