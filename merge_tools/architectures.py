"""What the merge knows of model architectures: data, no code of theirs.

For an architecture in the table, the layers that read each norm are known, so
sets may differ in those norms (`norms`), and every layer that the model needs
is listed, so a loss in all decoder layers at once is noticed (`complete`).
Any other dense model can be merged too, as long as its norms are equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_LAYER = re.compile(r"(?P<prefix>(?:.*\.)?layers\.)(?P<index>\d+)\.(?P<module>.+)")

FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Projections that vLLM runs as one layer, under its name."""

_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
_MLP = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, slots=True)
class Architecture:
    """Module names relative to a decoder layer (`model.layers.N.`), or whole for `outside`.

    norm_readers   norm -> the linear layers that take its output and nothing else
    layers         what each decoder layer has
    outside        what the model has besides
    """

    norm_readers: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {_NORMS[0]: _ATTENTION[:3], _NORMS[1]: _MLP[:2]}
    )
    layers: tuple[str, ...] = (*_ATTENTION, *_MLP, *_NORMS)
    outside: tuple[str, ...] = ("model.embed_tokens", "model.norm")


_LLAMA = Architecture()
ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": Architecture(
        layers=(*_LLAMA.layers, "self_attn.q_norm", "self_attn.k_norm")
    ),
}


def architecture(config: Mapping[str, Any]) -> Architecture | None:
    """The entry of the model, None for one that the table lacks."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        return None
    return ARCHITECTURES.get(names[0])


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a `config.json` that describes the language model."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def split_decoder(name: str) -> tuple[str, int, str] | None:
    """`model.layers.3.mlp.up_proj` -> ("model.layers.", 3, "mlp.up_proj"); None outside."""
    match = _LAYER.fullmatch(name)
    return (match["prefix"], int(match["index"]), match["module"]) if match else None


def norm_readers(config: Mapping[str, Any], norm: str) -> tuple[str, ...]:
    """The linear layers that read the module `norm`; empty when that is not known."""
    known, place = architecture(config), split_decoder(norm)
    if known is None or place is None:
        return ()
    prefix, index, module = place
    return tuple(f"{prefix}{index}.{reader}" for reader in known.norm_readers.get(module, ()))


def layer_globs(chosen: Iterable[str], every: Iterable[str]) -> tuple[str, ...]:
    """Globs over layer names that match `chosen` and no other of `every`.

    `model.layers.*.mlp.up_proj` where all indices are chosen, single names elsewhere.
    """
    chosen, every = set(chosen), set(every)
    by_glob: dict[str, set[str]] = {}
    for name in every:
        by_glob.setdefault(_glob(name), set()).add(name)
    globs = set()
    for name in chosen:
        glob = _glob(name)
        globs.add(glob if by_glob.get(glob, set()) <= chosen else _literal(name))
    return tuple(sorted(globs))


def _glob(name: str) -> str:
    place = split_decoder(name)
    if place is None:
        return _literal(name)
    prefix, _, module = place
    return f"{_literal(prefix)}*.{_literal(module)}"


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
