"""One table of models: an entry says which layers an architecture has and what they do.

To support another model, add an entry to `ARCHITECTURES` and a test that compares it with the
class in transformers (tests/unit/test_expected.py); see "Extending" in the documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_qoq.errors import FormatError, shown
from vllm_qoq.models.blocks import BlockNames, Mixture, Mlp
from vllm_qoq.models.config import CONFIG, architecture_name
from vllm_qoq.models.names import split_decoder
from vllm_qoq.models.vision import language_config

_MLP_NAMES = Mlp("gate_proj", "up_proj", "down_proj")
REMEDY = "mend it, or download the model again"
"""The advice in errors about an impossible `config.json`."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The weight of a layer: the names of its sizes (`tensors`), of which a linear layer has two.

    bias  the keys of `config.json` of which any announces a bias; or True, always, or False, never
    """

    sizes: tuple[str, ...]
    bias: tuple[str, ...] | bool = False

    def has_bias(self, config: Mapping[str, Any], defaults: Mapping[str, int | bool]) -> bool:
        """Whether the layer has a bias beside its weight; `defaults` are the architecture's."""
        if isinstance(self.bias, bool):
            return self.bias
        return any([flag(config, key, bool(defaults.get(key))) for key in self.bias])


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts in place of an MLP: a router, and `prefix.NUMBER.module`.

    shared       what every token goes through besides
    mlp          what the modules of an expert do
    shared_mlps  the MLPs among `shared`; what is left of it stays in float, as the router does
    """

    router: str
    prefix: str
    modules: Mapping[str, LayerSpec]
    shared: Mapping[str, LayerSpec] = field(default_factory=dict)
    mlp: Mlp = _MLP_NAMES
    shared_mlps: tuple[Mlp, ...] = ()


@dataclass(frozen=True)
class LayerNames:
    """The names of the layers of a model, by what they do, and what they compute.

    Layers of a block have their names below it (`model.layers.3`), all others their whole names.
    Where one layer does the work of several, as a `qkv_proj` of Phi 3 on disk, they have one name,
    and their rows follow each other in it.

    attention_norm, mlp_norm  the norm that q, k and v read, and that of gate and up: one norm may
                              be both, and None is none, where they read the stream as it is
    norm_offset       what every norm adds to its weight before it multiplies by it
    has_post_norms    whether norms run over what attention and MLP give to the stream
    has_mean_norms    whether norms subtract the mean
    has_head          whether vLLM takes an lm_head that is not the embedding
    has_heads_first   whether q_norm and k_norm get [batch, heads, tokens, D] in transformers, not
                      heads after tokens
    neighbor_pairs    whether RoPE turns the channels 2 i and 2 i + 1 of a head, not i and i + R / 2
    is_rope_partial   whether RoPE turns the first R channels of a head alone, where `config.json`
                      says so
    has_capped_scores whether attention bounds its scores, c tanh(score / c)
    activation        of the MLP, down(activation(gate(x)) * up(x))
    mixtures          the mixture of experts of each block, None for one with an MLP; empty where
                      all have an MLP
    has_wrong_hidden_act  whether `hidden_act` in `config.json` may be another, which vLLM ignores
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
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    q_norm: str | None = None
    k_norm: str | None = None
    norm_offset: float = 0.0
    has_post_norms: bool = False
    has_mean_norms: bool = False
    has_head: bool = True
    has_heads_first: bool = False
    neighbor_pairs: bool = False
    is_rope_partial: bool = False
    has_capped_scores: bool = False
    activation: str = "silu"
    has_wrong_hidden_act: bool = False
    mixtures: tuple[Mixture | None, ...] = field(default=(), repr=False)

    def of_block(self, index: int) -> BlockNames:
        """Name the layers of the block `index`."""
        mixture = self.mixtures[index] if self.mixtures else None
        norms, attention = (self.attention_norm, self.mlp_norm), (self.q, self.k, self.v)
        layers = (*norms, tuple(dict.fromkeys(attention)), self.o)
        if mixture is None:
            return BlockNames(*layers, mlps=(Mlp(self.gate, self.up, self.down),))
        return BlockNames(
            *layers,
            mlps=(*mixture.experts, *mixture.shared),
            routers=mixture.routers,
            expert_share=mixture.each / len(mixture.experts),
        )

    @property
    def routers(self) -> tuple[str, ...]:
        """List what stays in float in blocks with a mixture of experts, named below a block."""
        return next((mixture.routers for mixture in self.mixtures if mixture is not None), ())

    @property
    def fixed_stream(self) -> str | None:
        """Say why the residual stream cannot be rotated; None where it can."""
        if self.has_post_norms:
            return "norms after attention and MLP have weights for the channels of the stream"
        if self.has_mean_norms:
            return "norms subtract the mean of the channels"
        if not self.has_head:
            return "vLLM takes no lm_head but the embedding, and rotated ones differ"
        return None


@dataclass(frozen=True, slots=True)
class Architecture:
    """A kind of model, whose layers are named relative to a decoder layer (`model.layers.3.`).

    common    what every decoder layer has
    mlp       what a layer without experts has besides
    experts   what the other layers have besides; None where all layers have `mlp`
    is_tied   whether the embedding is the lm_head, too, when the config does not say
    defaults  the values that transformers and vLLM take for keys that the config lacks
    names     what its layers do, for a model that can be quantized, imported and merged with norms
              that differ; None for one of which only the tensors are known
    type      the `model_type` of `config.json`, where there are `names`
    """

    common: Mapping[str, LayerSpec]
    mlp: Mapping[str, LayerSpec]
    experts: Experts | None = None
    is_tied: bool = False
    defaults: Mapping[str, int | bool] = field(default_factory=dict)
    names: LayerNames | None = None
    type: str = ""


_NORM, _HEAD_NORM = LayerSpec(("hidden",)), LayerSpec(("head",))
_NORMS = {"input_layernorm": _NORM, "post_attention_layernorm": _NORM}
_FOUR_NORMS = _NORMS | {"pre_feedforward_layernorm": _NORM, "post_feedforward_layernorm": _NORM}
_QK_NORMS = {"self_attn.q_norm": _HEAD_NORM, "self_attn.k_norm": _HEAD_NORM}
_BIAS = ("attention_bias",)
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _attention(qkv: tuple[str, ...] | bool, o: tuple[str, ...] | bool) -> dict[str, LayerSpec]:
    return {
        "self_attn.q_proj": LayerSpec(("query", "hidden"), qkv),
        "self_attn.k_proj": LayerSpec(("key", "hidden"), qkv),
        "self_attn.v_proj": LayerSpec(("key", "hidden"), qkv),
        "self_attn.o_proj": LayerSpec(("hidden", "query"), o),
    }


def _mlp(
    parent: str = "mlp.", inner: str = "inner", bias: tuple[str, ...] = ()
) -> dict[str, LayerSpec]:
    return {
        f"{parent}gate_proj": LayerSpec((inner, "hidden"), bias),
        f"{parent}up_proj": LayerSpec((inner, "hidden"), bias),
        f"{parent}down_proj": LayerSpec(("hidden", inner), bias),
    }


_LLAMA = Architecture(
    # `bias` is the older key.
    _NORMS | _attention((*_BIAS, "bias"), (*_BIAS, "bias")),
    _mlp(bias=("mlp_bias",)),
    names=LayerNames(),
    type="llama",
)
_QWEN3 = _NORMS | _QK_NORMS | _attention(_BIAS, _BIAS)
_FUSED_MLP = {
    "mlp.gate_up_proj": LayerSpec(("two_inner", "hidden")),
    "mlp.down_proj": LayerSpec(("hidden", "inner")),
}
_FUSED_QKV_NAMES: dict[str, Any] = dict.fromkeys(("q", "k", "v"), "self_attn.qkv_proj")
_FUSED_MLP_NAMES: dict[str, Any] = dict.fromkeys(("gate", "up"), "mlp.gate_up_proj")
_GLM_NAMES: dict[str, Any] = {"neighbor_pairs": True, "is_rope_partial": True} | _FUSED_MLP_NAMES
_GLM_HEADS = {"head_dim": 128, "num_key_value_heads": 2}
_QK_NORMS_NAMES: dict[str, Any] = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_FOUR_NORMS_NAMES: dict[str, Any] = {
    "mlp_norm": "pre_feedforward_layernorm",
    "has_post_norms": True,
}
_GEMMA_NAMES: dict[str, Any] = {"norm_offset": 1.0, "activation": "gelu_pytorch_tanh"}
_GEMMA_HEADS = {"head_dim": 256, "num_key_value_heads": 4}
ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": Architecture(
        _LLAMA.common,
        _LLAMA.mlp,
        defaults={"num_key_value_heads": 8},
        names=LayerNames(),
        type="mistral",
    ),
    "Qwen2ForCausalLM": Architecture(
        _NORMS | _attention(True, False),
        _mlp(),
        defaults={"num_key_value_heads": 32},
        names=LayerNames(),
        type="qwen2",
    ),
    "Qwen3ForCausalLM": Architecture(
        _QWEN3,
        _mlp(),
        defaults={"head_dim": 128, "num_key_value_heads": 32},
        names=LayerNames(**_QK_NORMS_NAMES),
        type="qwen3",
    ),
    "Phi3ForCausalLM": Architecture(
        _NORMS
        | {
            "self_attn.qkv_proj": LayerSpec(("qkv", "hidden")),
            "self_attn.o_proj": LayerSpec(("hidden", "query")),
        },
        _FUSED_MLP,
        names=LayerNames(**_FUSED_QKV_NAMES, **_FUSED_MLP_NAMES, is_rope_partial=True),
        type="phi3",
    ),
    "GraniteForCausalLM": Architecture(
        _NORMS | _attention(_BIAS, _BIAS),
        _mlp(bias=("mlp_bias",)),
        names=LayerNames(),
        type="granite",
    ),
    "GemmaForCausalLM": Architecture(
        _NORMS | _attention(_BIAS, _BIAS),
        _mlp(),
        is_tied=True,
        defaults={"head_dim": 256, "num_key_value_heads": 16},
        names=LayerNames(has_head=False, has_wrong_hidden_act=True, **_GEMMA_NAMES),
        type="gemma",
    ),
    "Gemma2ForCausalLM": Architecture(
        _FOUR_NORMS | _attention(_BIAS, _BIAS),
        _mlp(),
        is_tied=True,
        defaults=_GEMMA_HEADS,
        names=LayerNames(
            has_head=False, has_capped_scores=True, **_GEMMA_NAMES, **_FOUR_NORMS_NAMES
        ),
        type="gemma2",
    ),
    "Gemma3ForCausalLM": Architecture(
        _FOUR_NORMS | _QK_NORMS | _attention(_BIAS, _BIAS),
        _mlp(),
        is_tied=True,
        defaults=_GEMMA_HEADS,
        names=LayerNames(
            has_heads_first=True, **_GEMMA_NAMES, **_FOUR_NORMS_NAMES, **_QK_NORMS_NAMES
        ),
        type="gemma3_text",
    ),
    "Olmo2ForCausalLM": Architecture(
        {
            "post_attention_layernorm": _NORM,
            "post_feedforward_layernorm": _NORM,
            "self_attn.q_norm": LayerSpec(("query",)),
            "self_attn.k_norm": LayerSpec(("key",)),
            **_attention(_BIAS, _BIAS),
        },
        _mlp(),
        names=LayerNames(
            attention_norm=None, mlp_norm=None, has_post_norms=True, **_QK_NORMS_NAMES
        ),
        type="olmo2",
    ),
    "Glm4ForCausalLM": Architecture(
        _NORMS
        | {"post_self_attn_layernorm": _NORM, "post_mlp_layernorm": _NORM}
        | _attention(_BIAS, False),
        _FUSED_MLP,
        defaults=_GLM_HEADS | {"attention_bias": True},
        names=LayerNames(has_post_norms=True, **_GLM_NAMES),
        type="glm4",
    ),
    "GlmForCausalLM": Architecture(
        _NORMS | _attention(_BIAS, False),
        _FUSED_MLP,
        defaults=_GLM_HEADS | {"attention_bias": True},
        names=LayerNames(**_GLM_NAMES),
        type="glm",
    ),
    "CohereForCausalLM": Architecture(
        {"input_layernorm": _NORM} | _attention(_BIAS, _BIAS),
        _mlp(),
        is_tied=True,
        names=LayerNames(
            mlp_norm="input_layernorm", has_mean_norms=True, has_head=False, neighbor_pairs=True
        ),
        type="cohere",
    ),
    "Ministral3ForCausalLM": Architecture(
        _NORMS | _attention(False, False),
        _mlp(),
        defaults={"head_dim": 128, "num_key_value_heads": 8},
        names=LayerNames(),
        type="ministral3",
    ),
    "MixtralForCausalLM": Architecture(
        _NORMS | _attention(False, False),
        {},
        Experts(
            "block_sparse_moe.gate",
            "block_sparse_moe.experts",
            {
                "w1": LayerSpec(("inner", "hidden")),
                "w2": LayerSpec(("hidden", "inner")),
                "w3": LayerSpec(("inner", "hidden")),
            },
            mlp=Mlp(gate="w1", up="w3", down="w2"),
        ),
        defaults={"num_key_value_heads": 8, "num_experts_per_tok": 2},
        names=LayerNames(),
        type="mixtral",
    ),
    "Qwen2MoeForCausalLM": Architecture(
        _NORMS | _attention(("qkv_bias",), False),
        _mlp(),
        Experts(
            "mlp.gate",
            "mlp.experts",
            _mlp("", "expert_inner"),
            shared={
                **_mlp("mlp.shared_expert.", "shared_inner"),
                "mlp.shared_expert_gate": LayerSpec(("one", "hidden")),
            },
            shared_mlps=(_MLP_NAMES.below("mlp.shared_expert"),),
        ),
        defaults={"num_key_value_heads": 16, "qkv_bias": True, "num_experts_per_tok": 4},
        names=LayerNames(),
        type="qwen2_moe",
    ),
    "Qwen3MoeForCausalLM": Architecture(
        _QWEN3,
        _mlp(),
        Experts("mlp.gate", "mlp.experts", _mlp("", "expert_inner")),
        defaults={"num_key_value_heads": 4, "num_experts_per_tok": 8},
        names=LayerNames(**_QK_NORMS_NAMES),
        type="qwen3_moe",
    ),
}
"""Every architecture whose tensors are known; those with `names` can be quantized."""


def architecture_of(config: Mapping[str, Any]) -> Architecture | None:
    """Find the entry of the table for a `config.json`; None for an architecture that it lacks."""
    return ARCHITECTURES.get(architecture_name(config) or "")


def with_names() -> dict[str, LayerNames]:
    """List the architectures whose layers have `names`, by class name."""
    return {name: one.names for name, one in ARCHITECTURES.items() if one.names is not None}


def with_experts() -> list[str]:
    """List the architectures with a mixture of experts, by class name."""
    return [name for name, one in ARCHITECTURES.items() if one.experts is not None]


def routers(model: Architecture) -> tuple[str, ...]:
    """List what tells how much of each expert a token gets, below a block: layers for all sets.

    They are the router, and the gate of an expert that every token goes through.
    """
    if model.experts is None:
        return ()
    gates = (name for name, spec in model.experts.shared.items() if spec.sizes[0] == "one")
    return (model.experts.router, *gates)


def router_globs() -> tuple[str, ...]:
    """List globs of the names that the `routers` of all architectures have."""
    found = (f"*.{name}" for model in ARCHITECTURES.values() for name in routers(model))
    return tuple(dict.fromkeys(found))


def norm_readers(config: Mapping[str, Any], norm: str) -> tuple[str, ...]:
    """List the linear layers that read the module `norm`; empty when that is not known.

    What a router and experts read is not listed, because a router is one for all sets.
    """
    known, place = architecture_of(language_config(config)), split_decoder(norm)
    if known is None or place is None:
        return ()
    norms = known.names.of_block(0).norms if known.names is not None else {}
    if known.experts is not None:
        norms = {"input_layernorm": _QKV}
    prefix, index, module = place
    return tuple(f"{prefix}{index}.{reader}" for reader in norms.get(module, ()))


def norm_offset(config: Mapping[str, Any]) -> float:
    """What the norms of a model add to their weights; 0 where that is not known."""
    known = architecture_of(language_config(config))
    return 0.0 if known is None or known.names is None else known.names.norm_offset


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """Read the value of `key`, or `default` without one; FormatError for what is no boolean."""
    value = config.get(key, default)
    if value is not None and not isinstance(value, bool):
        raise FormatError(f"{CONFIG}: {key}: {shown(value)} is not true or false; {REMEDY}")
    return bool(value)
