"""The KV cache in a checkpoint's config: which layers have keys and values of how many bits.

The `kv_cache` object of a checkpoint (`vllm_qoq.checkpoint.format`) reads

    {"bits": 4,
     "layers": [{"match": "model.layers.0.*", "bits": 16}],
     "hadamard": false,
     "k_mean": false}

`bits` is 4, 8, 16 or "k8v4", which is keys of 8 bits and values of 4; 16 is vLLM's own cache, in
the type that `--kv-cache-dtype` names. The first rule of `layers` whose glob matches an attention
layer's name overrides it. `hadamard` rotates K, and Q to match, before K is quantized, and `k_mean`
says that the checkpoint has a mean of K for each layer, which is subtracted before that
(`vllm_qoq.numerics.reference_attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from vllm_qoq.routing.table import MOST_RULES

Bits: TypeAlias = Literal[4, 8, 16, "k8v4"]
"""The precisions of a cache; those below 16 are `vllm_qoq.numerics.kv_layout.QuantizedBits`."""
UNQUANTIZED: Final = 16
_LARGER: tuple[Bits, ...] = (4, "k8v4", 8, UNQUANTIZED)  # each a larger cache than the one before


def described(bits: Bits) -> str:
    """Say for people what numbers are stored in: `4 bits`, or `k8v4`."""
    return f"{bits} bits" if isinstance(bits, int) else bits


def short_name(bits: Bits) -> str:
    """Name a cache in a word: `kv4`, or `k8v4`."""
    return f"kv{bits}" if isinstance(bits, int) else bits


class KVLayerRule(BaseModel):
    """A rule that sets the bits of the layers whose name matches the glob `match`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: str
    bits: Bits


class KVCache(BaseModel):
    """The form in which keys and values are stored, and for which they were prepared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Bits
    layers: tuple[KVLayerRule, ...] = Field(default=(), max_length=MOST_RULES)
    hadamard: bool = False
    k_mean: bool = Field(default=False, strict=True)

    def bits_of(self, layer: str) -> Bits:
        """The bits of one attention layer, named like `model.layers.0.self_attn.attn`."""
        matching = (rule.bits for rule in self.layers if fnmatchcase(layer, rule.match))
        return next(matching, self.bits)

    def is_quantized(self) -> bool:
        """Whether any layer can be in fewer than 16 bits."""
        return any(bits != UNQUANTIZED for bits in (self.bits, *(r.bits for r in self.layers)))

    def all_bits(self) -> str:
        """Everything that a layer can be in, the smallest first: `4`, `4,16`, `k8v4,8`."""
        found = {self.bits, *(rule.bits for rule in self.layers)}
        return ",".join(str(bits) for bits in _LARGER if bits in found)

    def unmatched(self, layers: Iterable[str]) -> list[str]:
        """The globs of the rules that match none of `layers`."""
        names = list(layers)
        return [
            rule.match
            for rule in self.layers
            if not any(fnmatchcase(name, rule.match) for name in names)
        ]

    def rename(self, map_name: Callable[[str], str]) -> KVCache:
        """Copy it with the globs passed through `map_name`."""
        rules = [rule.model_copy(update={"match": map_name(rule.match)}) for rule in self.layers]
        return self.model_copy(update={"layers": tuple(rules)})

    def to_json(self) -> dict[str, Any]:
        """Convert it to its JSON object, without what is as by default."""
        return self.model_dump(exclude_defaults=True, mode="json")
