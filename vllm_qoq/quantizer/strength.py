"""The strength of smoothing: scales whose rounding errors, on a few tokens, are least.

The searches try the scales `a^x / b^y` of a few exponents, with a what is divided by
the scale and b what is multiplied, and keep the best. Channels of zeros, which padded and
pruned models have, count as channels far smaller than the largest; heads of zeros are left
as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from vllm_qoq.numerics.reference_attention import hadamard
from vllm_qoq.quantizer.evaluate import round_keys, to_int8

# A channel that is smaller than the largest by this factor is a channel of zeros.
_TINY = 1e-5
_SMALLEST = 1e-30
_DOWN_EXPONENTS = ((0.0, 0.0), *((x / 10, 1 - x / 10) for x in range(1, 10)))
_KEY_EXPONENTS = ((0.0, 0.0), (0.5, 0.0), (0.5, 0.5), (1.0, 0.0))
# Of Adam: 40 steps at this rate find what 200 at a fifth of it do.
_STEPS, _RATE, _MOMENTS, _EPSILON = 40, 0.1, (0.9, 0.999), 1e-8
# The error of the sampled keys counts all of them alike, and a model does not: scales that made it
# a little smaller made one worse.
_WORTH = 0.5


def scale(
    divided: torch.Tensor, x: float, multiplied: torch.Tensor | None = None, y: float = 0.0
) -> torch.Tensor:
    """Compute divided^x / multiplied^y, float32 [..., K], each vector with geometric mean 1."""
    logarithm = _logarithm(divided) * x
    if multiplied is not None:
        logarithm = logarithm - _logarithm(multiplied) * y
    return (logarithm - logarithm.mean(dim=-1, keepdim=True)).exp()


def _logarithm(magnitudes: torch.Tensor) -> torch.Tensor:
    """Take the logarithm of magnitudes [..., K], bounded from below by each vector's largest.

    It is 0 for a vector of zeros.
    """
    magnitudes = magnitudes.float()
    largest = magnitudes.amax(dim=-1, keepdim=True)
    # The square of the smallest must not vanish where a search weights with it.
    floor = (largest * _TINY).clamp_min(_SMALLEST)
    return torch.where(largest > _SMALLEST, magnitudes.maximum(floor).log(), 0.0)


def down_scale(
    inputs: torch.Tensor,
    largest: torch.Tensor,
    weight: torch.Tensor,
    weight_bits: int,
    group_size: int,
    heads: int = 1,
) -> torch.Tensor:
    """Find scales float32 [K] for a layer [N, K] whose inputs are rounded to int8 per token.

    inputs       float [tokens, K], a sample
    largest      float32 [K], the largest magnitudes of all inputs
    weight_bits  4, in groups of `group_size`, or 8 with a scale per row
    heads        equal parts of the inputs, which get the same K / heads scales
    """
    inputs, weight = inputs.float(), weight.float()
    columns = weight.abs().amax(dim=0)
    exact = inputs @ weight.t()

    def error(candidate: torch.Tensor) -> float:
        rounded = _rounded_weight(weight * candidate, weight_bits, group_size)
        y = to_int8(inputs / candidate) @ rounded.t()
        return float(y.sub_(exact).square_().sum())

    largest, columns = (x.unflatten(0, (heads, -1)).amax(dim=0) for x in (largest, columns))
    candidates = (scale(largest, x, columns, y).repeat(heads) for x, y in _DOWN_EXPONENTS)
    return _best(candidates, error)


def key_scale(
    keys: torch.Tensor,
    query_pairs: torch.Tensor,
    bits: int,
    use_hadamard: bool = False,
    limits: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Find scales float32 [heads, head_dim / 2] for the pairs of the keys, head by head.

    keys          float [tokens, heads, head_dim] after RoPE, a sample
    query_pairs   float32 [heads, head_dim / 2]: root mean square of the queries' pairs
    use_hadamard  whether the cache rotates the keys
    limits        float32 [head_dim / 2], at most 1 and at least 1: between these scales have to be

    A key's error is about its range over the head, whatever the channel, and a query
    weights it. The product of both is minimized from the best of a few starts. A head whose error
    does not become much smaller keeps its keys as they are, with scales of 1.
    """
    keys = keys.float()

    def lost(candidate: torch.Tensor) -> torch.Tensor:
        both = torch.cat((candidate, candidate), dim=-1)
        error = (round_keys(keys / both, bits, use_hadamard) * both - keys) * query_pairs.repeat(
            1, 2
        )
        return error.square().mean(dim=0).sum(dim=-1)

    magnitude = pairs(keys).square().mean(dim=0).sqrt()
    starts = [scale(magnitude, x, query_pairs, y) for x, y in _KEY_EXPONENTS]
    start = _best_of_each_head(starts, lost)
    best = _best_of_each_head([start, _descend(keys, query_pairs, start, use_hadamard)], lost)
    if limits is not None:
        best = best.clamp(*limits)
    plain = torch.ones_like(best)
    is_worth_it = lost(best) < _WORTH * lost(plain)
    return torch.where(is_worth_it[:, None], best, plain)


def pairs(x: torch.Tensor) -> torch.Tensor:
    """Magnitudes of the pairs of RoPE: [..., head_dim] to float32 [..., head_dim / 2]."""
    return x.float().unflatten(-1, (2, -1)).norm(dim=-2)


def with_rope(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Apply RoPE to x [tokens, heads, head_dim] as the attention of the Llama family does.

    positions int64 [tokens], inv_freq float32 [head_dim / 2]
    """
    angles = positions[:, None, None] * inv_freq
    low, high = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def _descend(
    keys: torch.Tensor, query_pairs: torch.Tensor, start: torch.Tensor, use_hadamard: bool
) -> torch.Tensor:
    """Make the range of the keys, over a head, times the weight of its scales smaller, by Adam.

    The logarithm of mean(range^2) * sum((scale * weight)^2) is what gets less. A range is the
    difference of two channels, so its gradient is that of these two.
    """
    size = keys.shape[-1]
    turn = torch.eye(size, device=keys.device)
    turn = hadamard(turn) if use_hadamard else turn
    keys = keys.transpose(0, 1).contiguous()  # [heads, tokens, head_dim]
    logarithm = start.log()
    mean, square = torch.zeros_like(logarithm), torch.zeros_like(logarithm)
    for step in range(1, _STEPS + 1):
        inverse = (-logarithm).exp().repeat(1, 2)
        scaled = keys @ (inverse[:, :, None] * turn)
        high, highest = scaled.max(dim=-1, keepdim=True)
        low, lowest = scaled.min(dim=-1, keepdim=True)
        span = high - low
        error = span.square().mean(dim=1)  # [heads, 1]
        ends = torch.zeros_like(scaled).scatter_(-1, highest, span)
        ends.scatter_add_(-1, lowest, -span)
        slope = (keys.transpose(1, 2) @ ends * turn).sum(dim=-1) * inverse
        slope = slope.unflatten(-1, (2, -1)).sum(dim=1) * (-2 / keys.shape[1])
        weights = ((2 * logarithm).exp() * query_pairs.square()) * 2
        weight = weights.sum(dim=-1, keepdim=True)
        gradient = slope / error.clamp_min(_SMALLEST) + 2 * weights / weight.clamp_min(_SMALLEST)
        # A head of zero keys or queries loses nothing, and its scale stays where it is.
        gradient = torch.where(error * weight > _SMALLEST, gradient, 0.0)
        mean = mean.lerp(gradient, 1 - _MOMENTS[0])
        square = square.lerp(gradient.square(), 1 - _MOMENTS[1])
        first, second = (1 - moment**step for moment in _MOMENTS)
        logarithm = logarithm - _RATE * (mean / first) / ((square / second).sqrt() + _EPSILON)
    return logarithm.exp()


def _best_of_each_head(
    candidates: list[torch.Tensor], lost: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    losses = torch.stack([lost(candidate) for candidate in candidates])
    best = losses.nan_to_num(torch.inf, torch.inf).argmin(dim=0)
    stacked = torch.stack(candidates)
    return stacked[best, torch.arange(stacked.shape[1], device=best.device)]


def value_scale(values: torch.Tensor, readers: torch.Tensor) -> torch.Tensor:
    """Find scales sqrt(value / reader), float32 [kv_heads, head_dim], for values that R2 turns.

    values   float32 [kv_heads, head_dim]: root mean square
    readers  float32 [kv_heads, head_dim]: norm of the columns of o_proj that read the channel

    R2 spreads the rounding error evenly over a head, so that the output loses
    sum(v^2 / s^2) * sum(s^2 o^2), which by Cauchy and Schwarz is least for this s.
    """
    return scale(values, 0.5, readers, 0.5)


def _best(
    candidates: Iterable[torch.Tensor], error: Callable[[torch.Tensor], float]
) -> torch.Tensor:
    return min(candidates, key=error)


def _rounded_weight(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Round a weight to the nearest codes, in groups for 4 bits and per row for 8."""
    n, k = weight.shape
    size = group_size if bits == 4 else k
    # What fills up the last group widens no range.
    filled = torch.nn.functional.pad(weight, (0, -k % size), mode="replicate")
    groups = filled.view(n, -1, size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / ((1 << bits) - 1)).clamp_min(1e-10)
    return (((groups - low) / step).round() * step + low).view(n, -1)[:, :k]
