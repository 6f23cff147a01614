"""What calibration shows of the inputs of layers: their Hessian, and its factors for GPTQ.

Layers with the same input share one, and so do all sets. The Hessian is the mean of x x^T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_qoq.quantizer import QuantizeError

_DAMPINGS = (0.01, 0.1, 1.0)
_SMALLEST_DIAGONAL = 1e-8
# On a CPU the sum is made in strips of columns, of which those below the diagonal are left out.
_STRIP = 256


class HessianSum:
    """A sum of x x^T over the inputs x [K] that are added, in float32; `tokens` is their number."""

    def __init__(self, k: int, device: torch.device) -> None:
        self._sum = torch.zeros(k, k, device=device)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Add inputs, float [..., K]."""
        x = x.detach().flatten(0, -2)
        self.tokens += len(x)
        if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
            # Products of 16-bit floats are exact in float32, in which tensor cores add them.
            self._sum += torch.mm(x.t(), x, out_dtype=torch.float32)
        elif x.is_cuda:
            x = x.float()
            self._sum.addmm_(x.t(), x)
        else:
            x = x.float()
            for first in range(0, x.shape[1], _STRIP):
                strip = x[:, first : first + _STRIP]
                self._sum[first : first + _STRIP, first:].addmm_(strip.t(), x[:, first:])

    def take_mean(self) -> torch.Tensor:
        """Make the Hessian, float32 [K, K], in the memory of the sum, which is given away."""
        mean = self._sum.div_(self.tokens)
        if not mean.is_cuda:
            for first in range(0, len(mean), _STRIP):
                last = first + _STRIP
                mean[last:, first:last] = mean[first:last, last:].t()
        del self._sum
        return mean


@dataclass(frozen=True)
class Inputs:
    """A damped Hessian H of inputs, and the factor U of its inverse: H^-1 = U^T U, U upper.

    hessian  float32 [K, K], damped
    added    float32 [K], what damping added to the diagonal
    dead     bool [K], the inputs that are always zero
    lower    float32 [K, K], U^T
    """

    hessian: torch.Tensor
    added: torch.Tensor
    dead: torch.Tensor
    lower: torch.Tensor

    @property
    def importance(self) -> torch.Tensor:
        """What an error in a column costs, 1 / d^2 with d the diagonal of U: float32 [K]."""
        return self.lower.diagonal().square().reciprocal()


@torch.no_grad()
def factored(hessian: torch.Tensor, layer: str) -> Inputs:
    """Damp and factor a Hessian float32 [K, K], which is changed in place.

    Raises QuantizeError with the name of the `layer` if it cannot be factored. At most three
    matrices [K, K] are held beside this one, and one in the end.
    """
    before = hessian.diagonal().clone()
    dead, mean = before == 0, before.mean()
    for damping in _DAMPINGS:
        diagonal = before + damping * mean
        diagonal = torch.where(dead, mean.clamp_min(_SMALLEST_DIAGONAL), diagonal)
        hessian.diagonal().copy_(diagonal)
        lower = _factor(hessian)
        if lower is not None:
            return Inputs(hessian, diagonal - before, dead, lower)
    raise QuantizeError(
        f"{layer}: the inputs seen in calibration do not determine its weights; give more text "
        "(--samples, --seqlen)"
    )


def _factor(hessian: torch.Tensor) -> torch.Tensor | None:
    """Compute U^T with H^-1 = U^T U, float32 [K, K], or None where H is not positive definite.

    In reversed order of rows and columns H = L L^T. Back in order this is H = R R^T with R
    upper, so that U = R^-1: one factorization and one triangular inverse.
    """
    root, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed:
        return None
    inverse = torch.eye(len(hessian), device=hessian.device).t()  # as LAPACK stores a matrix
    torch.linalg.solve_triangular(root, inverse, upper=False, out=inverse)
    del root
    if not inverse.isfinite().all():
        return None
    # The transpose of what LAPACK stored has its rows in order.
    return inverse.t().flip(0, 1).contiguous()
