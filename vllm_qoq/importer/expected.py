"""Which tensors the base model has, from its `config.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_tools.architectures import ARCHITECTURES, architecture
from vllm_qoq.checkpoint import CONFIG
from vllm_qoq.format import FormatError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MOST = 1 << 24


@dataclass(frozen=True)
class Expected:
    """The decoder of the base model.

    linears   layer -> (out_features N, in_features K)
    biased    the linear layers that have a bias
    others    tensor -> shape: embedding, norms, lm_head
    is_tied   whether lm_head may be absent because the embedding serves as one
    """

    linears: Mapping[str, tuple[int, int]]
    biased: frozenset[str]
    others: Mapping[str, tuple[int, ...]]
    is_tied: bool


def expected(config: Mapping[str, Any]) -> Expected:
    """What a checkpoint of the model that `config` describes must hold."""
    known = architecture(config)
    if known is None:
        raise FormatError(
            f"{CONFIG}: architectures: {config.get('architectures')!r} cannot be imported; "
            f"the import knows {', '.join(ARCHITECTURES)}"
        )
    count = _size(config, "num_hidden_layers")
    sizes, shapes = _linears(config), _vectors(config)
    biased = _biased(config)
    linears, others = {}, {}
    for index in range(count):
        for module in known.layers:
            name = f"model.layers.{index}.{module}"
            if module in sizes:
                linears[name] = sizes[module]
            else:
                others[f"{name}.weight"] = shapes[module]
    hidden, vocabulary = _size(config, "hidden_size"), _size(config, "vocab_size")
    others |= {
        "model.norm.weight": (hidden,),
        EMBEDDING: (vocabulary, hidden),
        HEAD: (vocabulary, hidden),
    }
    is_biased = frozenset(name for name in linears if name.split(".", 3)[3] in biased)
    return Expected(linears, is_biased, others, bool(config.get("tie_word_embeddings", False)))


def _linears(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Module of a decoder layer -> (N, K)."""
    hidden, inner = _size(config, "hidden_size"), _size(config, "intermediate_size")
    query = _heads(config) * _head_dim(config)
    key = _size(config, "num_key_value_heads", _heads(config)) * _head_dim(config)
    return {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def _vectors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Norm of a decoder layer -> shape."""
    hidden, head = (_size(config, "hidden_size"),), (_head_dim(config),)
    return {
        "input_layernorm": hidden,
        "post_attention_layernorm": hidden,
        "self_attn.q_norm": head,
        "self_attn.k_norm": head,
    }


def _biased(config: Mapping[str, Any]) -> frozenset[str]:
    """The modules of a decoder layer that have a bias."""
    if config["architectures"] == ["Qwen2ForCausalLM"]:  # always, its config does not say so
        return frozenset(f"self_attn.{name}_proj" for name in "qkv")
    attention = [f"self_attn.{name}_proj" for name in "qkvo"] * bool(config.get("attention_bias"))
    mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")] * bool(config.get("mlp_bias"))
    return frozenset(attention + mlp)


def _heads(config: Mapping[str, Any]) -> int:
    return _size(config, "num_attention_heads")


def _head_dim(config: Mapping[str, Any]) -> int:
    return _size(config, "head_dim", _size(config, "hidden_size") // _heads(config))


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _MOST:
        raise FormatError(
            f"{CONFIG}: {key}: {value!r} is not a size; download the base model again"
        )
    return value
