"""Observing of one block while the calibration text runs through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch

from vllm_qoq.models.table import LayerNames
from vllm_qoq.quantizer.model import Dimensions
from vllm_qoq.quantizer.parts import Part, part_rows
from vllm_qoq.quantizer.rope import Rope
from vllm_qoq.quantizer.smooth import Seen, SeenAttention, SeenDown

SMOOTHING_TOKENS = 16384
"""So much of the calibration text is observed: means and magnitudes do not need more."""

_SAMPLE_TOKENS = 1024


class Observer:
    """An observer that gathers `Seen` from outputs of q, k and v and the inputs of `smoothed`.

    rope      of the block's attention; None where linear attention has no q, k and v
    smoothed  the layers that `BlockNames.smoothed` lists
    samples   pieces of text, with one of which it is called at a time

    It keeps a few tokens of each, `_SAMPLE_TOKENS` in all.
    """

    def __init__(
        self,
        names: LayerNames,
        dimensions: Dimensions,
        rope: Rope | None,
        smoothed: Iterable[str],
        samples: int,
    ) -> None:
        self._names, self._dimensions = names, dimensions
        self._tokens_per_sample = max(1, _SAMPLE_TOKENS // samples)
        self._positions: list[torch.Tensor] = []
        self._sampled: dict[str, list[torch.Tensor]] = {}
        self._largest: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._squares: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self.outputs: dict[str, Callable[[torch.Tensor], None]] = {}
        if rope is not None:
            self._rope = rope
            self.outputs = {
                names.q_norm or names.q: self._queries,
                names.k_norm or names.k: self._keys,
                names.v: self._values,
            }
            if names.q == names.k == names.v:
                self.outputs = {names.q: self._fused}
        self.inputs = {name: partial(self._down, name) for name in smoothed}

    def seen(self) -> Seen:
        """Put together what was gathered."""
        return Seen(
            attention=self._attention() if self.outputs else None,
            downs={
                name: SeenDown(torch.cat(self._sampled[name]), largest)
                for name, largest in self._largest.items()
            },
        )

    def _attention(self) -> SeenAttention:
        low, high = self._mean_square("queries").chunk(2, dim=-1)  # the halves of RoPE's pairs
        queries = (low + high).view(self._dimensions.kv_heads, self._dimensions.queries_per_kv, -1)
        return SeenAttention(
            keys=torch.cat(self._sampled["keys"]),
            positions=torch.cat(self._positions),
            mean_key=self._sums["keys"] / self._counts["keys"],
            query_pairs=queries.mean(dim=1).sqrt(),
            values=self._mean_square("values").sqrt(),
        )

    def _fused(self, x: torch.Tensor) -> None:
        """See q, k and v, which are rows of one layer."""
        seers: dict[Part, Callable[[torch.Tensor], None]] = {
            "q": self._queries,
            "k": self._keys,
            "v": self._values,
        }
        for part, see in seers.items():
            start, stop = part_rows(part, self._names, self._dimensions)
            see(x[..., start:stop])

    def _queries(self, x: torch.Tensor) -> None:
        queries = self._normed(x, self._dimensions.heads)
        self._add_squares("queries", self._rope.paired(queries))

    def _keys(self, x: torch.Tensor) -> None:
        keys = self._rope.paired(self._normed(x, self._dimensions.kv_heads))
        rows = self._sample("keys", keys)
        self._positions.append(rows)
        self._sums["keys"] = self._sums.get("keys", 0) + keys.double().sum(dim=0)
        self._counts["keys"] = self._counts.get("keys", 0) + len(keys)

    def _values(self, x: torch.Tensor) -> None:
        self._add_squares("values", self._heads(x, self._dimensions.kv_heads))

    def _down(self, name: str, x: torch.Tensor) -> None:
        tokens = x.detach().flatten(0, -2)
        self._sample(name, tokens)
        self._add_largest(name, tokens)

    def _normed(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """Take queries or keys, after their norm if there is one, as [tokens, heads, head_dim]."""
        if self._names.has_heads_first:
            x = x.transpose(1, 2)
        return self._heads(x, heads)

    def _heads(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.detach().reshape(-1, heads, self._dimensions.head_dim)

    def _sample(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """Keep a few rows, and return which."""
        step = max(1, len(tokens) // self._tokens_per_sample)
        rows = torch.arange(step // 2, len(tokens), step, device=tokens.device)
        rows = rows[: self._tokens_per_sample]
        self._sampled.setdefault(name, []).append(tokens[rows])
        return rows

    def _add_largest(self, name: str, x: torch.Tensor) -> None:
        largest = x.abs().amax(dim=0).float()
        known = self._largest.get(name)
        self._largest[name] = largest if known is None else torch.maximum(known, largest)

    def _add_squares(self, name: str, x: torch.Tensor) -> None:
        squares = x.float().square().sum(dim=0)
        self._squares[name] = self._squares.get(name, 0) + squares
        self._counts[name] = self._counts.get(name, 0) + len(x)

    def _mean_square(self, name: str) -> torch.Tensor:
        return self._squares[name] / self._counts[name]
