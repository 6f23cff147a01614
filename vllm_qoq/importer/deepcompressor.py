"""Reading raw outputs of deepcompressor and LMQuant: weights already rounded, and their scales.

`model.pt` has the rounded weights as float16 under Hugging Face names, `scale.pt`

    L.weight.scale.0      [N, 1, ...]              s1, per output channel
    L.weight.scale.1      [N, 1, K / G, ...]       s2, per group of G inputs
    L.weight.zero         like the last scale      an integer z:         W = (q - z) * scale
    L.weight.scaled_zero  like the last scale      z * scale in effect:  W = q * scale - it

with W / s1 and s2 in place of W and scale where there are groups. Codes come from rounding, and are
accepted only if they give the weights back.
"""

from __future__ import annotations

import torch

from vllm_qoq.checkpoint.folder import TensorInfo
from vllm_qoq.errors import FormatError
from vllm_qoq.importer import level2
from vllm_qoq.importer.detect import GROUP_SIZE_OF, VECTORS, Kind
from vllm_qoq.importer.source import RAW_SCALES, Source
from vllm_qoq.importer.values import check_finite, check_scale, damaged
from vllm_qoq.numerics.packing import pack_nibbles

# The relative step and the smallest number of float16.
_ULP, _TINY = 2.0**-10, 2.0**-24
_SIGNED = 8  # turns signed codes -8..7 into 0..15


class RawLayers:
    """The linear layers of `model.pt` and `scale.pt`, in our tensors, like `PackedLayers`."""

    repaired, proofs, is_order_guessed = False, 0, False

    def __init__(self, model: Source, scales: Source, kind: Kind) -> None:
        self._model, self._scales, self._kind = model, scales, kind

    def check(self, layer: str) -> dict[str, torch.Tensor]:
        """Convert a layer, which fails unless its scales are those of its weights.

        Returns our tensors with a number per output channel, by leaf.
        """
        return {k: v for k, v in self._convert(layer).items() if k in VECTORS}

    def settle(self) -> None:
        """Do nothing: raw outputs have no permuted tensors."""

    def weights(self, layer: str) -> dict[str, torch.Tensor]:
        """Convert a layer; returns our other tensors, by leaf."""
        return {k: v for k, v in self._convert(layer).items() if k not in VECTORS}

    def _convert(self, layer: str) -> dict[str, torch.Tensor]:
        info = self._model.tensors[f"{layer}.weight"]
        weight = check_finite(info, self._model.get(info.name)).float().contiguous()
        if self._kind in GROUP_SIZE_OF:
            return self._grouped(info, weight, weight.shape[1] // GROUP_SIZE_OF[self._kind])
        return self._channel(info, weight) if self._kind == "channel" else self._w8a8(info, weight)

    def _w8a8(self, info: TensorInfo, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = self._numbers(info, "scale.0", weight.shape[0], 1)
        codes = (weight / scale).round()
        _check_codes(info, codes, -128, 127)
        _check_restored(info, weight, codes * scale, codes * scale)
        return {"weight": codes.to(torch.int8), "weight_scale": scale}

    def _channel(self, info: TensorInfo, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = self._numbers(info, "scale.0", weight.shape[0], 1)
        zero = self._zero(info, scale, weight.shape[0], 1)
        codes = ((weight + zero) / scale).round()
        if codes.amin() < 0:
            codes, zero = codes + _SIGNED, zero + _SIGNED * scale
        _check_codes(info, codes, 0, 15)
        _check_restored(info, weight, codes * scale - zero, codes * scale)
        return {
            "qweight": pack_nibbles(codes.to(torch.uint8)),
            "channel_scale": scale.flatten(),
            "channel_zero": zero.flatten(),
        }

    def _grouped(
        self, info: TensorInfo, weight: torch.Tensor, groups: int
    ) -> dict[str, torch.Tensor]:
        n, k = weight.shape
        channel_scale = self._numbers(info, "scale.0", n, 1)
        scale = self._numbers(info, "scale.1", n, groups)
        zero = self._zero(info, scale, n, groups)
        if not ((scale >= 1) & (scale <= level2.MAX_SCALE) & (scale == scale.round())).all():
            raise damaged(
                self._scale_info(info, "scale.1"), f"holds more than integers 1..{level2.MAX_SCALE}"
            )
        if not (zero == zero.round()).all():
            raise damaged(info, f"has a zero point in {RAW_SCALES} that is not an integer")
        level1 = (weight / channel_scale).view(n, groups, -1)
        codes = ((level1 + zero[:, :, None]) / scale[:, :, None]).round()
        if codes.amin() < 0:
            codes, zero = codes + _SIGNED, zero + _SIGNED * scale
        _check_codes(info, codes, 0, 15)
        restored = (codes * scale[:, :, None] - zero[:, :, None]).view(n, k) * channel_scale
        _check_restored(info, weight, restored, restored)
        return _grouped(info, codes.view(n, k), channel_scale=channel_scale, scale=scale, zero=zero)

    def _zero(self, info: TensorInfo, scale: torch.Tensor, n: int, groups: int) -> torch.Tensor:
        """The offset that is taken off q * scale, float32 [N, groups]."""
        has_integer = f"{info.name}.zero" in self._scales.tensors
        if has_integer and f"{info.name}.scaled_zero" in self._scales.tensors:
            raise FormatError(f"{RAW_SCALES}: {info.name}.zero: there is a scaled_zero, too")
        if not has_integer:
            return self._numbers(info, "scaled_zero", n, groups)
        return self._numbers(info, "zero", n, groups) * scale

    def _numbers(self, info: TensorInfo, leaf: str, n: int, groups: int) -> torch.Tensor:
        """Read a tensor of `scale.pt`, where dimensions of size 1 stay: float32 [N, groups]."""
        found = self._scale_info(info, leaf)
        if not _is_broadcastable(found.shape, n, groups):
            raise FormatError(
                f"{found.file}: {found.name}: is {list(found.shape)}, expected {[n, 1, groups, 1]}"
            )
        values = self._scales.get(found.name).float()
        check = check_scale if leaf.startswith("scale.") else check_finite
        values = check(found, values)
        return values.reshape(n, groups) if values.numel() > 1 else values.expand(n, groups)

    def _scale_info(self, info: TensorInfo, leaf: str) -> TensorInfo:
        name = f"{info.name}.{leaf}"
        if name not in self._scales.tensors:
            raise FormatError(
                f"{RAW_SCALES}: {name}: missing, other layers have it; save model.pt and "
                "scale.pt again, from one run"
            )
        return self._scales.tensors[name]


def _is_broadcastable(shape: tuple[int, ...], n: int, groups: int) -> bool:
    sizes = [size for size in shape if size != 1]
    return not sizes or sizes == [size for size in (n, groups) if size != 1]


def _grouped(
    info: TensorInfo,
    codes: torch.Tensor,
    channel_scale: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
) -> dict[str, torch.Tensor]:
    codes, scale = codes.to(torch.uint8), scale.to(torch.int16)
    offset = (-zero).to(torch.int16)
    low, high = level2.extent(codes, scale.shape[1])
    if not level2.fits(low, high, scale, offset).all():
        raise damaged(info, "has weights beyond int8 on the first level")
    codes, group_offset = level2.canonical(codes, low, scale, offset)
    return {
        "qweight": pack_nibbles(codes),
        "channel_scale": channel_scale.flatten(),
        "group_scale": scale.to(torch.uint8),
        "group_offset": group_offset,
    }


def _check_codes(info: TensorInfo, codes: torch.Tensor, low: int, high: int) -> None:
    if codes.amin() < low or codes.amax() > high:
        raise damaged(
            info,
            f"has codes from {int(codes.amin())} to {int(codes.amax())} with the scales of "
            f"{RAW_SCALES}, expected {low} to {high}",
        )


def _check_restored(
    info: TensorInfo, weight: torch.Tensor, restored: torch.Tensor, largest: torch.Tensor
) -> None:
    """Raise FormatError for weights that are not `restored`, but for the rounding of float16.

    `largest` is the largest number on the way, whose rounding the weight has inherited.
    """
    allowed = torch.maximum(largest.abs(), restored.abs()) * _ULP + _TINY
    is_wrong = (weight - restored).abs() > allowed
    if is_wrong.any():
        row, column = (int(i) for i in is_wrong.nonzero()[0])
        raise damaged(
            info,
            f"is {float(weight[row, column])} in row {row}, column {column}, but the scales of "
            f"{RAW_SCALES} allow {float(restored[row, column])} there",
        )
