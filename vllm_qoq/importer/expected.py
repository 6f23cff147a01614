"""Which tensors the base model has, from its `config.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_tools.architectures import ARCHITECTURES, architecture
from vllm_qoq.checkpoint import CONFIG
from vllm_qoq.errors import shown
from vllm_qoq.format import FormatError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Older versions of transformers save this constant, which the model computes, with the weights.
CONSTANT = ".rotary_emb.inv_freq"
_REMEDY = "mend it, or download the model again"
_MOST = 1 << 24
_MOST_LAYERS = 4096
# What transformers takes where config.json does not say it; elsewhere, as many as heads.
_KEY_VALUE_HEADS = {"MistralForCausalLM": 8, "Qwen2ForCausalLM": 32, "Qwen3ForCausalLM": 32}
_HEAD_DIM = {"Qwen3ForCausalLM": 128}


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


def expected(config: Mapping[str, Any], task: str = "imported") -> Expected:
    """What a checkpoint of the model that `config` describes must hold.

    FormatError for an architecture that cannot be `task`, and for sizes that cannot be.
    """
    known = architecture(config)
    if known is None:
        raise FormatError(
            f"{CONFIG}: architectures: {shown(config.get('architectures'))} cannot be {task}; "
            f"what can is a language model, one of {', '.join(ARCHITECTURES)}"
        )
    count = _size(config, "num_hidden_layers", most=_MOST_LAYERS)
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
    return Expected(linears, is_biased, others, _flag(config, "tie_word_embeddings"))


def _linears(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Module of a decoder layer -> (N, K)."""
    hidden, inner = _size(config, "hidden_size"), _size(config, "intermediate_size")
    query = _heads(config) * _head_dim(config)
    key = _key_value_heads(config) * _head_dim(config)
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
    attention = [f"self_attn.{name}_proj" for name in "qkvo"] * _flag(config, "attention_bias")
    mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")] * _flag(config, "mlp_bias")
    return frozenset(attention + mlp)


def _heads(config: Mapping[str, Any]) -> int:
    return _size(config, "num_attention_heads")


def _key_value_heads(config: Mapping[str, Any]) -> int:
    heads = _heads(config)
    default = _KEY_VALUE_HEADS.get(config["architectures"][0], heads)
    if "num_key_value_heads" in config:  # null stands for as many as heads
        default = heads
    found = _size(config, "num_key_value_heads", default)
    if heads % found:
        raise FormatError(
            f"{CONFIG}: num_attention_heads: {heads} is not a multiple of num_key_value_heads, "
            f"{found}; {_REMEDY}"
        )
    return found


def _head_dim(config: Mapping[str, Any]) -> int:
    heads, hidden = _heads(config), _size(config, "hidden_size")
    default = _HEAD_DIM.get(config["architectures"][0])
    if config.get("head_dim") is None and default is None and hidden % heads:
        raise FormatError(
            f"{CONFIG}: hidden_size: {hidden} is not a multiple of num_attention_heads, {heads}, "
            f"and there is no head_dim; {_REMEDY}"
        )
    found = _size(config, "head_dim", default or hidden // heads)
    if found % 2:
        raise FormatError(
            f"{CONFIG}: head_dim: {found} is odd, but rotary embeddings turn pairs; {_REMEDY}"
        )
    return found


def _size(
    config: Mapping[str, Any], key: str, default: int | None = None, most: int = _MOST
) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise FormatError(f"{CONFIG}: {key}: missing; {_REMEDY}")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise FormatError(
            f"{CONFIG}: {key}: {shown(value)} is not a whole number from 1 to {most}; {_REMEDY}"
        )
    return value


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise FormatError(f"{CONFIG}: {key}: {shown(value)} is not true or false; {_REMEDY}")
    return bool(value)
