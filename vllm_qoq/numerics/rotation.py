"""The basis of a rotated residual stream, and the way back to the original model's.

`vllm_qoq.checkpoint.format` says what the tensors `stream.rotation` and `stream.norm` mean.
"""

from __future__ import annotations

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


def last_hidden_state(
    hidden: torch.Tensor, stored: torch.Tensor, norm: torch.Tensor
) -> torch.Tensor:
    """Turn the last hidden state [..., H] of a rotated model into the original model's.

    stored  the rotation's signs [H, H] in the dtype of `hidden`
    norm    [H], the final norm's weight in the original model
    """
    # What leaves the norm has a length of sqrt(H), so no sum exceeds H: float16 holds it.
    turned = torch.nn.functional.linear(hidden, stored)
    return (turned.float() * (norm.float() / len(stored) ** 0.5)).to(hidden.dtype)
