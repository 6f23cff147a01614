"""The grids of the sets: how a column of weights becomes codes and what they stand for.

A grid is filled by `gptq.quantize`: `prepare` sees the whole weight, `start` the next
columns as they are after the errors of earlier ones were passed on, `round` one column,
and again when a later pass looks at it anew.

`importance` float32 [K] is what an error in a column costs, 1 / d^2 with d the diagonal
of the Cholesky factor of the inverse Hessian: the loss that GPTQ itself adds up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch.nn.functional import pad

from vllm_qoq.numerics import GROUP_SIZE, group_count
from vllm_qoq.numerics.packing import pack_nibbles

# Level 1 of QoQ. With codes 0..15 and scales up to 16, a group whose weights lie within
# +-119 has a scale and an offset with which every code stands for an int8 (QServe's
# protective range).
PROTECTED = 119
_MAX_GROUP_SCALE = 16
_MIN_SCALE = 1e-10
# These scales are tried, as shares of the one that clips nothing.
_ROW_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
_GROUP_SHARES = tuple(1.0 - 0.025 * i for i in range(17))
_SCALES_BELOW = 4


class Grid(ABC):
    """The codes of one layer, int16 [N, K] while the grid is filled.

    clip  whether scales smaller than the largest weight asks for are tried
    """

    block = GROUP_SIZE

    def __init__(self, n: int, k: int, device: torch.device, clip: bool) -> None:
        self.codes = torch.empty(n, k, dtype=torch.int16, device=device)
        self.clip = clip

    @abstractmethod
    def prepare(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        """Choose what belongs to whole rows: weight float32 [N, K]."""

    def start(  # noqa: B027 - grids without groups have nothing to choose
        self, weight: torch.Tensor, importance: torch.Tensor, first: int
    ) -> None:
        """Choose what belongs to the columns from `first`: weight float32 [N, up to `block`]."""

    @abstractmethod
    def round(self, column: torch.Tensor, k: int) -> torch.Tensor:
        """Store the codes of column `k`, float32 [N], and return what they stand for."""

    @abstractmethod
    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Make the tensors that the set stores of the layer, by leaf; `dtype` is the model's."""

    @abstractmethod
    def dequantized(self) -> torch.Tensor:
        """Compute the weight that the codes stand for: float32 [N, K]."""


class TwoLevel(Grid):
    """The grid of QoQ in groups of 128: W = (q * group_scale + group_offset) * channel_scale."""

    def prepare(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        """Choose channel_scale; a smaller one clips the row's outliers, but resolves the rest."""
        n, k = weight.shape
        largest = (weight.abs().amax(dim=1) / PROTECTED).clamp_min(_MIN_SCALE)
        self.channel_scale = largest.clone()
        if self.clip:
            # What fills up the last group widens no range and costs nothing.
            missing = (0, -k % GROUP_SIZE)
            groups = pad(weight, missing, mode="replicate").view(n, -1, GROUP_SIZE)
            cost = pad(importance, missing).view(1, -1, GROUP_SIZE)
            best = torch.full_like(largest, torch.inf)
            for share in _ROW_SHARES:
                scale = largest * share
                level1 = groups / scale[:, None, None]
                _, _, error = _search(level1, cost, scales_below=2, shifts=False)
                _keep_better(best, error.sum(dim=1) * scale.square(), self.channel_scale, scale)
        shape = (n, group_count(k))
        self.group_scale = torch.empty(shape, device=weight.device)
        self.group_offset = torch.empty(shape, device=weight.device)

    def start(self, weight: torch.Tensor, importance: torch.Tensor, first: int) -> None:
        """Search the group's scale and offset over the integers."""
        level1 = weight / self.channel_scale[:, None]
        scale, offset, _ = _search(
            level1[:, None],
            importance.view(1, 1, -1),
            scales_below=_SCALES_BELOW if self.clip else 0,
            shifts=self.clip,
        )
        group = first // GROUP_SIZE
        self.group_scale[:, group], self.group_offset[:, group] = scale[:, 0], offset[:, 0]

    def round(self, column: torch.Tensor, k: int) -> torch.Tensor:
        """Take the nearest code of the group."""
        scale, offset = self.group_scale[:, k // GROUP_SIZE], self.group_offset[:, k // GROUP_SIZE]
        codes = ((column / self.channel_scale - offset) / scale).round().clamp(0, 15)
        self.codes[:, k] = codes
        return (codes * scale + offset) * self.channel_scale

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
        return self.level1() * self.channel_scale[:, None]

    def level1(self) -> torch.Tensor:
        """Compute W8, the integers of the first level, in float32 [N, K]."""
        k = self.codes.shape[1]
        scale = self.group_scale.repeat_interleave(GROUP_SIZE, dim=1)[:, :k]
        offset = self.group_offset.repeat_interleave(GROUP_SIZE, dim=1)[:, :k]
        return self.codes * scale + offset


class PerChannel(Grid):
    """The grid of QoQ without groups: W = q * channel_scale - channel_zero."""

    def prepare(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        """Choose scale and zero of each row, shrinking its range as far as it pays."""
        low, high = weight.amin(dim=1), weight.amax(dim=1)
        self.channel_scale = ((high - low) / 15).clamp_min(_MIN_SCALE)
        self.channel_zero = -low
        if not self.clip:
            return
        best = torch.full_like(low, torch.inf)
        for share in (1.0 - 0.02 * i for i in range(31)):
            scale = ((high - low) * share / 15).clamp_min(_MIN_SCALE)
            zero = -low * share
            codes = ((weight + zero[:, None]) / scale[:, None]).round().clamp(0, 15)
            error = codes * scale[:, None] - zero[:, None] - weight
            is_better = _keep_better(
                best, (error.square() * importance).sum(dim=1), self.channel_scale, scale
            )
            self.channel_zero[is_better] = zero[is_better]

    def round(self, column: torch.Tensor, k: int) -> torch.Tensor:
        """Take the nearest code of the row."""
        codes = ((column + self.channel_zero) / self.channel_scale).round().clamp(0, 15)
        self.codes[:, k] = codes
        return codes * self.channel_scale - self.channel_zero

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Make the tensors of `vllm_qoq.checkpoint.format`."""
        return {
            "qweight": pack_nibbles(self.codes),
            "channel_scale": self.channel_scale,
            "channel_zero": self.channel_zero,
        }

    def dequantized(self) -> torch.Tensor:
        """Compute the weight that the codes stand for: float32 [N, K]."""
        return self.codes * self.channel_scale[:, None] - self.channel_zero[:, None]


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
        super().__init__(n, k, device, clip)
        self.lowest, self.highest = -(1 << bits - 1), (1 << bits - 1) - 1
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

    def round(self, column: torch.Tensor, k: int) -> torch.Tensor:
        """Take the nearest code."""
        scale = self.scale[:, 0 if self.group is None else k // self.group]
        codes = (column / scale).round().clamp(self.lowest, self.highest)
        self.codes[:, k] = codes
        return codes * scale

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Make the tensors of compressed-tensors: int8 codes, or eight 4-bit codes in an int32."""
        scale = self.scale.to(self.scale_dtype)
        if self.highest > 7:
            return {"weight": self.codes.to(torch.int8), "weight_scale": scale}
        n, k = self.codes.shape
        words = (self.codes.to(torch.int32) + 8).view(n, k // 8, 8)
        packed = torch.zeros(n, k // 8, dtype=torch.int32, device=words.device)
        for i in range(8):  # from the low bits up
            packed |= words[:, :, i] << (4 * i)
        shape = torch.tensor([n, k], dtype=torch.int64)
        return {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}

    def dequantized(self) -> torch.Tensor:
        """Compute the weight that the codes stand for: float32 [N, K]."""
        repeats = self.codes.shape[1] // self.scale.shape[1]
        return self.codes * self.scale.repeat_interleave(repeats, dim=1)

    def _best_scale(self, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        # For 4 bits the step is chosen so that -8 and 7 miss the largest weight by half of it.
        largest = weight.abs().amax(dim=1) / (self.highest + (0.5 if self.highest == 7 else 0))
        found = self._rounded(largest)
        best = torch.full_like(found, torch.inf)
        for share in _GROUP_SHARES if self.clip else ():
            scale = self._rounded(largest * share)
            codes = (weight / scale[:, None]).round().clamp(self.lowest, self.highest)
            error = ((codes * scale[:, None] - weight).square() * importance).sum(dim=1)
            _keep_better(best, error, found, scale)
        return found

    def _rounded(self, scale: torch.Tensor) -> torch.Tensor:
        """Round a scale as it will be stored, so that the codes fit the scale that vLLM reads."""
        smallest = torch.finfo(self.scale_dtype).smallest_normal * torch.finfo(self.scale_dtype).eps
        return scale.clamp_min(max(_MIN_SCALE, smallest)).to(self.scale_dtype).float()


def _search(
    level1: torch.Tensor, cost: torch.Tensor, scales_below: int, shifts: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Search the integers (scale, offset) of least error for each group; returns that error, too.

    level1 is float32 [N, groups, 128] and cost [1, groups, 128]; the results are [N, groups].
    Tried are the scale that covers the group's range and the next smaller ones, each with the
    range centred; with `shifts`, also every offset within half a step of there.
    """
    low, high = level1.amin(dim=2), level1.amax(dim=2)
    cover = ((high - low) / 15).ceil().clamp(1, _MAX_GROUP_SCALE)
    best_scale, best_offset = cover.clone(), torch.zeros_like(cover)
    best = torch.full_like(cover, torch.inf)
    for below in range(scales_below + 1):
        scale = (cover - below).clamp_min(1)
        centre = (low + high) / 2 - 7.5 * scale
        reach = int(scale.max()) // 2 if shifts else 0
        for shift in range(-reach, reach + 1):
            offset = (centre + shift).round().clamp_min(-128).minimum(127 - 15 * scale)
            codes = ((level1 - offset[:, :, None]) / scale[:, :, None]).round_().clamp_(0, 15)
            values = codes.mul_(scale[:, :, None]).add_(offset[:, :, None])
            error = values.sub_(level1).square_().mul_(cost).sum(dim=2)
            is_better = _keep_better(best, error, best_scale, scale)
            best_offset[is_better] = offset[is_better]
    return best_scale, best_offset, best


def _keep_better(
    best: torch.Tensor, error: torch.Tensor, kept: torch.Tensor, candidate: torch.Tensor
) -> torch.Tensor:
    """Take over `candidate` where its `error` is below `best`; returns a mask of these places."""
    is_better = error < best
    best[is_better] = error[is_better]
    kept[is_better] = candidate[is_better]
    return is_better
