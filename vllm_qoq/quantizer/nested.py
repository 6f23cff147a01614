"""The grid of a nested 8-bit set: codes within a 4-bit residual of a QoQ layer's."""

from __future__ import annotations

import torch

from vllm_qoq.numerics.packing import pack_nibbles
from vllm_qoq.numerics.reference import RESIDUAL_ZERO
from vllm_qoq.quantizer.grid import Grid, TwoLevel


class Nested(Grid):
    """The grid W = W8 * channel_scale, with W8 an int8 from base - 8 to base + 7.

    base  the filled grid of the 4-bit set, which stays as it is
    """

    def __init__(self, base: TwoLevel) -> None:
        n, k = base.codes.shape
        super().__init__(n, k, base.codes.device, clip=False)
        self.channel_scale = base.channel_scale
        self.base = base.level1().to(torch.int16)
        self.low = (self.base - RESIDUAL_ZERO).clamp_min(-128)
        self.high = (self.base + (15 - RESIDUAL_ZERO)).clamp_max(127)
        self.is_clipped = torch.zeros_like(self.base, dtype=torch.bool)

    def prepare(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        """Do nothing: the scales are the base's."""

    def round(self, column: torch.Tensor, k: int) -> torch.Tensor:
        """Take the nearest int8 that a residual reaches."""
        nearest = (column / self.channel_scale).round()
        codes = nearest.maximum(self.low[:, k]).minimum(self.high[:, k])
        self.is_clipped[:, k] = codes != nearest
        self.codes[:, k] = codes
        return codes * self.channel_scale

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Make the tensors of `vllm_qoq.checkpoint.format.ResidualSet`."""
        return {"qresidual": pack_nibbles(self.codes - self.base + RESIDUAL_ZERO)}

    def dequantized(self) -> torch.Tensor:
        """Compute the weight that the codes stand for: float32 [N, K]."""
        return self.codes * self.channel_scale[:, None]

    def clipped_share(self) -> float:
        """The share of weights whose nearest int8 is out of reach."""
        return float(self.is_clipped.float().mean())
