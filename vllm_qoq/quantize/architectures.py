"""The decoder models that can be quantized, as a table of module names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_qoq.checkpoint import CONFIG
from vllm_qoq.errors import shown
from vllm_qoq.format import SECTION
from vllm_qoq.importer.expected import expected
from vllm_qoq.quantize import QuantizeError


@dataclass(frozen=True)
class Architecture:
    """Names below one block of the model (`model.layers.3`), and beside the blocks.

    Every group in `inputs` is a tuple of linear layers that read the same tensor: a
    norm's output (`norms`), the attention output or the MLP's inner product.
    """

    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str = "model.rotary_emb"
    attention: str = "self_attn"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    q_norm: str | None = None
    k_norm: str | None = None

    @property
    def norms(self) -> dict[str, tuple[str, ...]]:
        """Norm -> the layers that read it."""
        return {
            self.attention_norm: (self.q, self.k, self.v),
            self.mlp_norm: (self.gate, self.up),
        }

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """Groups of linear layers that read one tensor, in the order in which they run."""
        return ((self.q, self.k, self.v), (self.o,), (self.gate, self.up), (self.down,))

    @property
    def linears(self) -> tuple[str, ...]:
        """All quantized layers of a block."""
        return tuple(name for group in self.inputs for name in group)


_LLAMA = Architecture()
_QWEN3 = Architecture(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
_ARCHITECTURES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _QWEN3}
# By which vLLM chooses a model. Classifiers, rewards and embeddings share the model_type.
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The table entry for a model's config.json; QuantizeError names what is not supported."""
    if config.get(SECTION) is not None:
        raise QuantizeError("the model is quantized already; give the one in bf16 or fp16")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        raise QuantizeError(
            f"{CONFIG}: model_type {shown(kind)} is not supported; supported are "
            f"{', '.join(_ARCHITECTURES)}"
        )
    if config.get("architectures", [_CLASSES[kind]]) not in (None, [_CLASSES[kind]]):
        raise QuantizeError(
            f"{CONFIG}: architectures: {shown(config.get('architectures'))} cannot be quantized; "
            f"a model of type {kind!r} must be [{_CLASSES[kind]!r}], the language model alone, so "
            "give that one"
        )
    return _ARCHITECTURES[kind]


@dataclass(frozen=True)
class Shape:
    """The sizes that the steps need."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Read config.json, with the defaults of transformers; FormatError for what is no size."""
        names = {"architectures": [_CLASSES[config["model_type"]]]}
        model = expected({**config, **names}, "quantized")
        q, hidden = model.linears["model.layers.0.self_attn.q_proj"]
        k, _ = model.linears["model.layers.0.self_attn.k_proj"]
        heads = config["num_attention_heads"]
        head_dim = q // heads
        return cls(hidden, config["num_hidden_layers"], heads, k // head_dim, head_dim)

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.kv_heads


Module = Any
"""An `nn.Module`, untyped: mypy takes each attribute of one for either a tensor or a module."""


def blocks(model: Module, arch: Architecture) -> list[Module]:
    """The decoder blocks in order."""
    return list(model.get_submodule(arch.blocks).children())
