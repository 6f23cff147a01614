"""The grids of the sets: how weights become codes, and what codes stand for.

A grid is filled by `gptq`: `prepare` sees the whole weight, `start` the next columns as they are
after the errors of earlier ones were passed on. `scaled` then gives them in units of codes, in
which `rounding` works, and `store` keeps the codes that it finds.

`importance` float32 [K] is what an error in a column costs, 1 / d^2 with d the diagonal
of the Cholesky factor of the inverse Hessian: the loss that GPTQ itself adds up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import copy

import torch
from torch.nn.functional import pad
from typing_extensions import Self

from vllm_qoq.numerics import group_count
from vllm_qoq.numerics.packing import pack_nibbles
from vllm_qoq.quantizer import rounding
from vllm_qoq.quantizer.rounding_plain import Bound, weighted_errors

# Level 1 of QoQ. With codes 0..15 and scales up to 16, a group whose weights lie within
# +-119 has a scale and an offset with which every code stands for an int8 (QServe's
# protective range).
PROTECTED = 119
_MIN_SCALE = 1e-10
# These scales are tried, as shares of the one that clips nothing.
_ROW_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
_GROUP_SHARES = tuple(1.0 - 0.025 * i for i in range(17))
_SCALES_BELOW = 4


class Grid(ABC):
    """The codes of the layers with one input, int8 [N, K], one row for each output.

    clip   whether scales smaller than the largest weight asks for are tried
    width  columns that are rounded at a time, W below: a group, where there are groups. The last
           ones may be fewer.
    """

    def __init__(
        self, n: int, k: int, device: torch.device, clip: bool, width: int = rounding.WIDTH
    ) -> None:
        self.codes = torch.empty(n, k, dtype=torch.int8, device=device)
        self.clip, self.width = clip, width

    def rows(self, first: int, last: int) -> Self:
        """Take the part of a layer, whose rows begin at `first` and end before `last`."""
        part = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(part, name, value[first:last])
        return part

    @abstractmethod
    def prepare(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        """Choose what belongs to whole rows: weight float32 [N, K]."""

    def start(  # noqa: B027 - grids without groups have nothing to choose
        self, weight: torch.Tensor, importance: torch.Tensor, first: int
    ) -> None:
        """Choose what belongs to the columns from `first`: weight float32 [N, W]."""

    @abstractmethod
    def scaled(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """Bring the columns from `first` into units of codes: float32 [N, W]."""

    @abstractmethod
    def step(self, first: int) -> torch.Tensor:
        """What one code more stands for in the columns from `first`: float32 [N, 1]."""

    @abstractmethod
    def bounds(self, first: int) -> tuple[Bound, Bound]:
        """The lowest and the highest code of the columns from `first`."""

    def store(self, codes: torch.Tensor, first: int) -> None:
        """Keep the codes of the columns from `first`, integers in float32 [N, W]."""
        self.codes[:, first : first + codes.shape[1]] = codes

    def settle(self, ideal: torch.Tensor) -> None:  # noqa: B027 - most grids need nothing of it
        """See, when all codes are stored, what the weights float [N, K] would be unrounded."""

    @abstractmethod
    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Make the tensors that the set stores of the layer, by leaf; `dtype` is the model's."""

    @abstractmethod
    def dequantized(self) -> torch.Tensor:
        """Compute the weight that the codes stand for: float32 [N, K]."""


class TwoLevel(Grid):
    """The grid of QoQ in groups: W = (q * group_scale + group_offset) * channel_scale."""

    def prepare(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        """Choose channel_scale; a smaller one clips the row's outliers, but resolves the rest."""
        n, k = weight.shape
        largest = (weight.abs().amax(dim=1) / PROTECTED).clamp_min(_MIN_SCALE)
        self.channel_scale = largest.clone()
        if self.clip:
            # What fills up the last group widens no range and costs nothing.
            missing = (0, -k % self.width)
            filled = pad(weight, missing, mode="replicate") if missing[1] else weight
            cost = pad(importance, missing).view(-1, self.width)
            best = torch.full_like(largest, torch.inf)
            for share in _ROW_SHARES:
                scale = largest * share
                level1 = (filled / scale[:, None]).view(n, -1, self.width)
                _, _, error = self._search(level1, cost, scales_below=2, shifts=False)
                lost = error.sum(dim=1) * scale.square()
                best, self.channel_scale = _better(lost, scale, best, self.channel_scale)
        shape = (n, group_count(k, self.width))
        self.group_scale = torch.empty(shape, device=weight.device)
        self.group_offset = torch.empty(shape, device=weight.device)

    def start(self, weight: torch.Tensor, importance: torch.Tensor, first: int) -> None:
        """Search the group's scale and offset over the integers."""
        level1 = weight / self.channel_scale[:, None]
        scale, offset, _ = self._search(
            level1[:, None],
            importance[None],
            scales_below=_SCALES_BELOW if self.clip else 0,
            shifts=self.clip,
        )
        group = first // self.width
        self.group_scale[:, group], self.group_offset[:, group] = scale[:, 0], offset[:, 0]

    def scaled(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """Bring the columns from `first` into units of codes: float32 [N, W]."""
        group = first // self.width
        level1 = weight / self.channel_scale[:, None]
        return (level1 - self.group_offset[:, group, None]) / self.group_scale[:, group, None]

    def step(self, first: int) -> torch.Tensor:
        """What one code more stands for in the columns from `first`: float32 [N, 1]."""
        return (self.group_scale[:, first // self.width] * self.channel_scale)[:, None]

    def bounds(self, first: int) -> tuple[Bound, Bound]:
        """The lowest and the highest code."""
        return 0, 15

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Make the tensors of `vllm_qoq.checkpoint.format`; asserts the protective range."""
        top = self.group_offset + 15 * self.group_scale
        assert self.group_offset.min() >= -128 and top.max() <= 127, "protective range"
        return {
            "qweight": pack_nibbles(self.codes),
            "channel_scale": self.channel_scale,
            "group_scale": self.group_scale.to(torch.uint8),
            "group_offset": self.group_offset.to(torch.int8),
        }

    def dequantized(self) -> torch.Tensor:
        """Compute the weight that the codes stand for: float32 [N, K]."""
        return self.level1().mul_(self.channel_scale[:, None])

    def level1(self) -> torch.Tensor:
        """Compute W8, the integers of the first level, in float32 [N, K]."""
        level1 = self.codes.float()
        # In place, since a matrix of this size for each would be what a GPU holds most of. The last
        # group may be smaller.
        whole = level1.shape[1] // self.width
        groups = level1[:, : whole * self.width].unflatten(1, (whole, self.width))
        rest = level1[:, whole * self.width :]
        groups.mul_(self.group_scale[:, :whole, None]).add_(self.group_offset[:, :whole, None])
        rest.mul_(self.group_scale[:, whole:]).add_(self.group_offset[:, whole:])
        return level1

    def _search(
        self, level1: torch.Tensor, cost: torch.Tensor, scales_below: int, shifts: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return rounding.on(level1.device, level1.shape[2]).search(
            level1, cost, scales_below, shifts
        )


class PerChannel(Grid):
    """The grid of QoQ without groups: W = q * channel_scale - channel_zero."""

    def prepare(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        """Choose scale and zero of each row, shrinking its range as far as it pays."""
        low, high = weight.amin(dim=1), weight.amax(dim=1)
        self.channel_scale = ((high - low) / 15).clamp_min(_MIN_SCALE)
        self.channel_zero = -low
        best = torch.full_like(low, torch.inf)
        for share in (1.0 - 0.02 * i for i in range(31)) if self.clip else ():
            scale = ((high - low) * share / 15).clamp_min(_MIN_SCALE)
            zero = -low * share
            error = weighted_errors(weight, scale, -zero, (0, 15), importance)
            is_better = error < best
            self.channel_zero = torch.where(is_better, zero, self.channel_zero)
            best, self.channel_scale = _better(error, scale, best, self.channel_scale)

    def scaled(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """Bring the columns from `first` into units of codes: float32 [N, W]."""
        return (weight + self.channel_zero[:, None]) / self.channel_scale[:, None]

    def step(self, first: int) -> torch.Tensor:
        """What one code more stands for in the columns from `first`: float32 [N, 1]."""
        return self.channel_scale[:, None]

    def bounds(self, first: int) -> tuple[Bound, Bound]:
        """The lowest and the highest code."""
        return 0, 15

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Make the tensors of `vllm_qoq.checkpoint.format`."""
        return {
            "qweight": pack_nibbles(self.codes),
            "channel_scale": self.channel_scale,
            "channel_zero": self.channel_zero,
        }

    def dequantized(self) -> torch.Tensor:
        """Compute the weight that the codes stand for: float32 [N, K]."""
        return (self.codes * self.channel_scale[:, None]).sub_(self.channel_zero[:, None])


class Symmetric(Grid):
    """The grid of compressed-tensors: signed codes with a scale per row (`group` None) or group."""

    def __init__(
        self,
        n: int,
        k: int,
        device: torch.device,
        clip: bool,
        bits: int,
        group: int | None,
        scale_dtype: torch.dtype,
    ) -> None:
        super().__init__(n, k, device, clip, width=rounding.WIDTH if group is None else group)
        self.low, self.high = -(1 << bits - 1), (1 << bits - 1) - 1
        self.group, self.scale_dtype = group, scale_dtype
        columns = 1 if group is None else k // group
        self.scale = torch.empty(n, columns, device=device)

    def prepare(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        """Choose the scales of the rows, where there are no groups."""
        if self.group is None:
            self.scale[:, 0] = self._best_scale(weight, importance)

    def start(self, weight: torch.Tensor, importance: torch.Tensor, first: int) -> None:
        """Choose the scales of the group, where there are groups."""
        if self.group is not None:
            self.scale[:, first // self.group] = self._best_scale(weight, importance)

    def scaled(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """Bring the columns from `first` into units of codes: float32 [N, W]."""
        return weight / self.step(first)

    def step(self, first: int) -> torch.Tensor:
        """What one code more stands for in the columns from `first`: float32 [N, 1]."""
        return self.scale[:, 0 if self.group is None else first // self.group, None]

    def bounds(self, first: int) -> tuple[Bound, Bound]:
        """The lowest and the highest code."""
        return self.low, self.high

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Make the tensors of compressed-tensors: int8 codes, or eight 4-bit codes in an int32."""
        scale = self.scale.to(self.scale_dtype)
        if self.high > 7:
            return {"weight": self.codes, "weight_scale": scale}
        n, k = self.codes.shape
        words = (self.codes.to(torch.int32) + 8).view(n, k // 8, 8)
        packed = torch.zeros(n, k // 8, dtype=torch.int32, device=words.device)
        for i in range(8):  # from the low bits up
            packed |= words[:, :, i] << (4 * i)
        shape = torch.tensor([n, k], dtype=torch.int64)
        return {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}

    def dequantized(self) -> torch.Tensor:
        """Compute the weight that the codes stand for: float32 [N, K]."""
        groups = self.codes.unflatten(1, (self.scale.shape[1], -1))
        return (groups * self.scale[:, :, None]).flatten(1)

    def _best_scale(self, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        # For 4 bits the step is chosen so that -8 and 7 miss the largest weight by half of it.
        largest = weight.abs().amax(dim=1) / (self.high + (0.5 if self.high == 7 else 0))
        found = self._rounded(largest)
        best = torch.full_like(found, torch.inf)
        for share in _GROUP_SHARES if self.clip else ():
            scale = self._rounded(largest * share)
            error = weighted_errors(weight, scale, None, (self.low, self.high), importance)
            best, found = _better(error, scale, best, found)
        return found

    def _rounded(self, scale: torch.Tensor) -> torch.Tensor:
        """Round a scale as it will be stored, so that the codes fit the scale that vLLM reads."""
        smallest = torch.finfo(self.scale_dtype).smallest_normal * torch.finfo(self.scale_dtype).eps
        return scale.clamp_min(max(_MIN_SCALE, smallest)).to(self.scale_dtype).float()


def _better(
    error: torch.Tensor, candidate: torch.Tensor, best: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take over `candidate` where its `error` is below `best`; returns the new best and kept."""
    return torch.minimum(best, error), torch.where(error < best, candidate, kept)
