"""The algebra: an adapter's matrices, changed as `quantize` changed the weights that they add to.

Where a layer's weight became T @ W @ S, the matrices of its adapter become T @ B and A @ S. What T
and S are is written at the top of `vllm_qoq.checkpoint.transforms`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vllm_qoq.checkpoint import transforms
from vllm_qoq.checkpoint.transforms import Transforms
from vllm_qoq.models.mixtures import names_of
from vllm_qoq.models.table import LayerNames
from vllm_qoq.models.tensors import expected_tensors

_PARTS = ("q", "k", "v")


class Basis:
    """The basis of a checkpoint's weights.

    config  that of the language model
    """

    def __init__(self, config: Mapping[str, Any], found: Transforms) -> None:
        names, model = names_of(config), expected_tensors(config)
        assert names is not None
        self._names: LayerNames = names
        self._found = found
        self._kv_heads, self._head = model.key_heads
        shapes = (model.of_layer(i).get(f"{names.o}.weight") for i in range(model.layers))
        inputs = next((shape[1] for shape in shapes if shape is not None), 0)
        self._heads = inputs // self._head
        self._stream = _orthogonal(found.rotation)
        self._values = _orthogonal(found.of(transforms.VALUE_ROTATION))

    def inputs(self, index: int, layer: str, a: torch.Tensor) -> torch.Tensor:
        """Change A [r, K], float64, of a layer of block `index`, as the columns of its weight."""
        layers = self._names.of_block(index)
        for norm, readers in layers.norms.items():
            folded = self._of(index, f"{norm}.{transforms.FOLDED}")
            if layer in readers and folded is not None:
                assert self._stream is not None
                a = (a * folded) @ self._stream
        if layer == layers.o and not layers.has_keys:
            scale = self._of(index, f"{layer}.{transforms.SCALE}")
            a = a if scale is None else a * scale
        elif layer == layers.o:
            scale = self._of(index, transforms.VALUE_SCALE)
            if scale is not None:
                a = a * self._of_queries(scale)
            if self._values is not None:
                a = (a.unflatten(1, (-1, self._head)) @ self._values).flatten(1)
        for mlp in layers.mlps:
            if layer == mlp.down:
                scale = self._of(index, f"{mlp.down}.{transforms.SCALE}")
                order = self._order(index, mlp.down)
                a = a if scale is None else a * scale
                a = a if order is None else a[:, order]
        return a

    def outputs(self, index: int, layer: str, b: torch.Tensor) -> torch.Tensor:
        """Change B [N, r], float64, of a layer of block `index`, as the rows of its weight."""
        layers = self._names.of_block(index)
        if layer in layers.stream_writers and self._stream is not None:
            b = self._stream.t() @ b
        if layers.has_keys and layer in layers.attention:
            parts = [part for part in _PARTS if getattr(self._names, part) == layer]
            heads = {"q": self._heads, "k": self._kv_heads, "v": self._kv_heads}
            # Alone, q may have gates besides.
            rows = [heads[part] * self._head for part in parts] if len(parts) > 1 else [len(b)]
            split = zip(parts, b.split(rows), strict=True)
            b = torch.cat([self._part(index, part, own) for part, own in split])
        for mlp in layers.mlps:
            if layer in mlp.readers:
                parts = [part for part in ("gate", "up") if getattr(mlp, part) == layer]
                split = zip(parts, b.chunk(len(parts)), strict=True)
                b = torch.cat([self._half(index, mlp.down, part, own) for part, own in split])
        return b

    def _part(self, index: int, part: str, b: torch.Tensor) -> torch.Tensor:
        """Change the rows of q, k or v."""
        if part == "v":
            scale = self._of(index, transforms.VALUE_SCALE)
            if scale is not None:
                b = b / scale.flatten()[:, None]
            if self._values is not None:
                b = (self._values.t() @ b.unflatten(0, (-1, self._head))).flatten(0, 1)
            return b
        scale = self._of(index, transforms.KEY_SCALE)
        if scale is None or self._names.k_norm is not None:  # norms have taken it
            return b
        if part == "q":
            return b * self._of_queries(scale)[:, None]
        return b / scale.flatten()[:, None]

    def _half(self, index: int, down: str, part: str, b: torch.Tensor) -> torch.Tensor:
        """Change the rows of gate or up, whose product is the input of `down`."""
        scale = self._of(index, f"{down}.{transforms.SCALE}")
        if part == "up" and scale is not None:
            b = b / scale[:, None]
        order = self._order(index, down)
        return b if order is None else b[order]

    def _of_queries(self, scale: torch.Tensor) -> torch.Tensor:
        """Repeat what the heads of K have, [kv_heads, D], for those of Q that share them."""
        return scale.repeat_interleave(self._heads // self._kv_heads, dim=0).flatten()

    def _of(self, index: int, name: str) -> torch.Tensor | None:
        found = self._found.of(f"{self._names.blocks}.{index}.{name}")
        return None if found is None else found.double()

    def _order(self, index: int, down: str) -> torch.Tensor | None:
        found = self._found.of(f"{self._names.blocks}.{index}.{down}.{transforms.ORDER}")
        return None if found is None else found.long()


def _orthogonal(signs: torch.Tensor | None) -> torch.Tensor | None:
    """Make the matrix, float64, of the signs that a checkpoint stores."""
    return None if signs is None else signs.double() / len(signs) ** 0.5
