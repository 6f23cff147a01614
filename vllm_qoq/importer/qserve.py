"""Reading a packed checkpoint of QServe or deepcompressor, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from vllm_qoq.errors import FormatError
from vllm_qoq.importer import level2, tiles
from vllm_qoq.importer.detect import GROUP_SIZE_OF, Kind
from vllm_qoq.importer.source import Source
from vllm_qoq.importer.tiles import S2_ORDERS, S2Order
from vllm_qoq.importer.values import check_finite, check_scale, damaged
from vllm_qoq.numerics.packing import pack_nibbles


class PackedLayers:
    """The linear layers of `source`, in our tensors.

    `check` every layer, then `settle`, then take the `weights`.

    order             the order of `s2_scales` that the caller knows, or None to find it out
    repaired          after `settle`: whether it was deepcompressor's
    proofs            after `settle`: how many layers allow that order only
    is_order_guessed  after `settle`: neither a layer nor the caller says it
    """

    def __init__(self, source: Source, kind: Kind, order: S2Order | None) -> None:
        self._source, self._kind, self._asked = source, kind, order
        self._ranks: dict[str, dict[S2Order, int]] = {}
        self._order: S2Order = order or "qserve"
        self.repaired, self.proofs, self.is_order_guessed = False, 0, False

    def check(self, layer: str) -> dict[str, torch.Tensor]:
        """Check every number of a layer.

        Returns our tensors with a number per output channel, by leaf.
        """
        if self._kind == "w8a8":
            scale = self._checked(layer, "dequant_scale", check_scale)
            return {"weight_scale": scale.float().reshape(-1, 1)}
        vectors = {"channel_scale": self._checked(layer, "s1_scales", check_scale).float()}
        if self._kind == "channel":
            vectors["channel_zero"] = self._checked(layer, "s1_szeros", check_finite).float()
        else:
            self._check_level2(layer)
        return vectors

    def settle(self) -> None:
        """Decide on the order of `s2_scales`, which one converter wrote and so is one for all."""
        if self._kind not in GROUP_SIZE_OF:
            return
        proofs = {layer: order for layer in self._ranks if (order := self._proof(layer))}
        by_order = {order: layer for layer, order in proofs.items()}
        if len(by_order) > 1:
            raise FormatError(
                f"{by_order['qserve']}.s2_scales: is in the order of QServe, but "
                f"{by_order['deepcompressor']}.s2_scales in that of deepcompressor; "
                "convert the model again"
            )
        for order, layer in by_order.items():
            if self._asked not in (None, order):
                raise FormatError(
                    f"{layer}.s2_scales: is in the order of {order}, not of {self._asked}; "
                    "leave --s2-order out"
                )
            self._order = order
        self.repaired = self._order == "deepcompressor"
        self.proofs = Counter(proofs.values())[self._order]
        self.is_order_guessed = self._asked is None and not self.proofs

    def weights(self, layer: str) -> dict[str, torch.Tensor]:
        """Convert a layer; returns our other tensors, by leaf."""
        if self._kind == "w8a8":
            return {"weight": self._get(layer, "weight")}
        codes = tiles.unpack_tiles(self._get(layer, "qweight"))
        if self._kind == "channel":
            return {"qweight": pack_nibbles(codes)}
        low, high = level2.extent(codes, self._groups(layer))
        scale, offset, _ = self._level2(layer, self._order, low, high)
        codes, group_offset = level2.canonical(codes, low, scale, offset)
        return {
            "qweight": pack_nibbles(codes),
            "group_scale": scale.to(torch.uint8),
            "group_offset": group_offset,
        }

    def _check_level2(self, layer: str) -> None:
        name = f"{layer}.s2_scales"
        scales = self._source.get(name)
        if not ((scales >= 1) & (scales <= level2.MAX_SCALE)).all():
            raise damaged(
                self._source.tensors[name],
                f"holds scales from {int(scales.min())} to {int(scales.max())}, "
                f"expected 1 to {level2.MAX_SCALE}",
            )
        codes = tiles.unpack_tiles(self._get(layer, "qweight"))
        low, high = level2.extent(codes, self._groups(layer))
        ranks = {order: self._level2(layer, order, low, high)[2] for order in S2_ORDERS}
        if min(ranks.values()) == level2.BROKEN:
            raise damaged(
                self._source.tensors[f"{layer}.s2_zeros"],
                "makes weights beyond int8, in the channel orders of QServe and of deepcompressor",
            )
        self._ranks[layer] = ranks

    def _level2(
        self, layer: str, order: S2Order, low: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Scale and offset int16 [N, groups] if `order` is right, and how sound they are."""
        scale = tiles.channels_first(self._get(layer, "s2_scales"), order).to(torch.int16)
        zeros = tiles.channels_first(self._get(layer, "s2_zeros"), order)
        offset, rank = level2.unwrap(low, high, scale, zeros)
        return scale, offset, rank

    def _proof(self, layer: str) -> S2Order | None:
        """The order of `s2_scales` that a layer proves; None if both make sense."""
        ranks = self._ranks[layer]
        if ranks["qserve"] == ranks["deepcompressor"]:
            return None
        return min(S2_ORDERS, key=lambda order: ranks[order])

    def _groups(self, layer: str) -> int:
        """The groups of a row."""
        return self._source.tensors[f"{layer}.s2_scales"].shape[0]

    def _get(self, layer: str, leaf: str) -> torch.Tensor:
        return self._source.get(f"{layer}.{leaf}")

    def _checked(self, layer: str, leaf: str, check: Callable[..., torch.Tensor]) -> torch.Tensor:
        name = f"{layer}.{leaf}"
        return check(self._source.tensors[name], self._source.get(name))
