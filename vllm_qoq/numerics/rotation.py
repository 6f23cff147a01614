"""The basis of a rotated residual stream, and the way back to the original model's.

`vllm_qoq.checkpoint.format` says what the tensors `stream.rotation` and `stream.norm` mean.
"""

from __future__ import annotations

import math

import torch

# The integers of the probe stay below this, so that every sum over two products of up to 2**15
# columns is exact in float64.
_PROBE_LIMIT = 1 << 20
_PROBE_ROWS = 256


def signs(rotation: torch.Tensor) -> torch.Tensor:
    """Take the signs, int8 [H, H], of an orthogonal matrix whose entries have one magnitude.

    A checkpoint stores these. Raises ValueError for any other matrix.
    """
    found = rotation.sign().to(torch.int8)
    if message := finding(found):
        raise ValueError(message)
    if not torch.allclose(found.to(rotation.dtype) / len(rotation) ** 0.5, rotation, rtol=1e-9):
        raise ValueError("has entries of several magnitudes")
    return found


def finding(stored: torch.Tensor) -> str | None:
    """Say what is wrong with the signs, int8 [H, H], of a rotation; None where nothing is.

    The rows are orthogonal if S @ S.T is H times the identity. That is tried with a random vector
    of integers, with which any other matrix passes once in a million times.
    """
    if not (stored.abs() == 1).all():
        return "holds something else than -1 and 1"
    size = len(stored)
    random = torch.Generator().manual_seed(0)
    probe = torch.randint(1, _PROBE_LIMIT, (size,), generator=random).to(stored.device).double()
    chunks = list(zip(stored.split(_PROBE_ROWS), probe.split(_PROBE_ROWS), strict=True))
    turned = sum((part @ rows.double() for rows, part in chunks), torch.zeros_like(probe))
    if all(torch.equal(rows.double() @ turned, part * size) for rows, part in chunks):
        return None
    return "has rows that are not orthogonal"


def matrix(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Make the rotation of its signs [H, H], but for the factor `scale(H)`.

    Its entries are one power of two, which no dtype rounds, and near 1 / sqrt(H), so that products
    with a stream are as large as the stream: float16 holds them.
    """
    return stored.to(dtype) * 2.0 ** -_exponent(len(stored))


def scale(size: int) -> float:
    """Say by what the products with `matrix` have to be multiplied: 1 or nearly so."""
    return float(2.0 ** _exponent(size) / size**0.5)


def original_stream(stream: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn states of the stream [..., n * H] into the original model's, each H of them by itself.

    turn  `matrix`, in the dtype of `stream`
    """
    turned = torch.nn.functional.linear(stream.unflatten(-1, (-1, len(turn))), turn).flatten(-2)
    factor = scale(len(turn))
    return turned if factor == 1 else turned * factor


def last_hidden_state(
    hidden: torch.Tensor, turn: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """Turn the last hidden state [..., H] of a rotated model into the original model's.

    turn    `matrix`, in the dtype of `hidden`
    factor  float32 [H], `scale(H)` times the final norm's weight in the original model
    """
    return torch.nn.functional.linear(hidden, turn).mul_(factor)  # rounded to the dtype once more


def head_input(hidden: torch.Tensor, turn: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Turn what the original lm_head would read [..., H] into what the rotated model's reads.

    turn    `matrix`, in the dtype of `hidden`
    factor  float32 [H], `scale(H)` divided by the final norm's weight in the original model, which
            is a part of the rotated model's lm_head
    """
    return (hidden * factor).to(hidden.dtype) @ turn


def spread(norm: torch.Tensor) -> float:
    """Say by what a norm's weight [H] enlarges rounding when it is divided out of what it scaled.

    1 where all weights are alike, infinite where one is zero.
    """
    weight = norm.double()
    return float((weight.square().mean() * weight.square().reciprocal().mean()).sqrt())


def _exponent(size: int) -> int:
    return round(math.log2(size) / 2)
