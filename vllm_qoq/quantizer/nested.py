"""The grid of a nested 8-bit set: codes within a 4-bit residual of a QoQ layer's."""

from __future__ import annotations

import torch

from vllm_qoq.numerics.packing import pack_nibbles
from vllm_qoq.numerics.reference import RESIDUAL_ZERO
from vllm_qoq.quantizer.grid import Grid, TwoLevel
from vllm_qoq.quantizer.rounding_plain import Bound


class Nested(Grid):
    """The grid W = W8 * channel_scale, with W8 an int8 from base - 8 to base + 7.

    base  the filled grid of the 4-bit set, which stays as it is
    """

    def __init__(self, base: TwoLevel) -> None:
        n, k = base.codes.shape
        super().__init__(n, k, base.codes.device, clip=False)
        self.channel_scale = base.channel_scale
        self.base = base.level1().to(torch.int8)

    def prepare(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        """Do nothing: the scales are the base's."""

    def scaled(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """Bring the columns from `first` into units of codes: float32 [N, W]."""
        return weight / self.channel_scale[:, None]

    def step(self, first: int) -> torch.Tensor:
        """What one code more stands for in the columns from `first`: float32 [N, 1]."""
        return self.channel_scale[:, None]

    def bounds(self, first: int) -> tuple[Bound, Bound]:
        """The codes that a residual reaches in the columns from `first`: float32 [N, W] each."""
        low, high = _reached(self.base[:, first : first + self.width])
        return low.float(), high.float()

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Make the tensors of `vllm_qoq.checkpoint.format.ResidualSet`."""
        return {"qresidual": pack_nibbles(self.codes.short() - self.base + RESIDUAL_ZERO)}

    def dequantized(self) -> torch.Tensor:
        """Compute the weight that the codes stand for: float32 [N, K]."""
        return self.codes * self.channel_scale[:, None]

    def settle(self, ideal: torch.Tensor) -> None:
        """Note which weights a residual does not reach."""
        nearest = (ideal / self.channel_scale[:, None]).round_()
        low, high = _reached(self.base)
        is_below = (nearest < low).logical_and_(self.codes == low)
        self.is_clipped = is_below.logical_or_((nearest > high).logical_and_(self.codes == high))

    def clipped_share(self) -> float:
        """The share of weights whose nearest int8 is out of reach."""
        return float(self.is_clipped.float().mean())


def _reached(base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest and the highest int8 that a residual on `base` int8 reaches, in int16."""
    base = base.short()
    return (base - RESIDUAL_ZERO).clamp_min(-128), (base + (15 - RESIDUAL_ZERO)).clamp_max(127)
