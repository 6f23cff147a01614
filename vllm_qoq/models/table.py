"""One table of models: an entry says which layers an architecture has and what they do.

To support another model, add an entry to `ARCHITECTURES` and a test that compares it with the
class in transformers (tests/unit/test_expected.py); see "Extending" in the documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_qoq.errors import FormatError, shown
from vllm_qoq.models.blocks import BlockNames, LinearAttention, Mixture, Mlp
from vllm_qoq.models.config import CONFIG, architecture_name
from vllm_qoq.models.names import split_decoder
from vllm_qoq.models.vision import language_config

_MLP_NAMES = Mlp("gate_proj", "up_proj", "down_proj")
FULL, LINEAR = "full_attention", "linear_attention"
"""The kinds of decoder layers that `layer_types` of a hybrid model's `config.json` has."""
REMEDY = "mend it, or download the model again"
"""The advice in errors about an impossible `config.json`."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The weight of a layer: the names of its sizes (`tensors`), of which a linear layer has two.

    bias        the keys of `config.json` of which any announces a bias; or True, always, or False,
                never
    is_tensor   whether this is a tensor by itself, no module that has a weight
    """

    sizes: tuple[str, ...]
    bias: tuple[str, ...] | bool = False
    is_tensor: bool = False

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
    still_kind        the kind of layer, of `layer_types`, without RoPE; None where all have it
    is_rope_partial   whether RoPE turns the first R channels of a head alone, where `config.json`
                      says so
    has_capped_scores whether attention bounds its scores, c tanh(score / c)
    has_output_gate   whether each channel of what attention gives is multiplied by a gate, for
                      which q_proj has outputs, too
    has_plain_head    whether vLLM's lm_head of this class takes no quantization
    activation        of the MLP, down(activation(gate(x)) * up(x))
    mixtures          the mixture of experts of each block, None for one with an MLP; empty where
                      all have an MLP
    linear            linear attention, in the blocks whose kind is LINEAR
    kinds             the kind of each block, FULL or LINEAR; empty where all have attention
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
    still_kind: str | None = None
    is_rope_partial: bool = False
    has_capped_scores: bool = False
    has_output_gate: bool = False
    has_plain_head: bool = False
    activation: str = "silu"
    has_wrong_hidden_act: bool = False
    linear: LinearAttention | None = None
    kinds: tuple[str, ...] = field(default=(), repr=False)
    mixtures: tuple[Mixture | None, ...] = field(default=(), repr=False)

    def of_block(self, index: int) -> BlockNames:
        """Name the layers of the block `index`."""
        mixture = self.mixtures[index] if self.mixtures else None
        attention = tuple(dict.fromkeys((self.q, self.k, self.v)))
        block = BlockNames(
            self.attention_norm,
            self.mlp_norm,
            attention,
            self.o,
            mlps=(Mlp(self.gate, self.up, self.down),),
        )
        if self.linear is not None and self.kinds and self.kinds[index] == LINEAR:
            block = replace(
                block,
                attention=self.linear.readers,
                o=self.linear.o,
                has_keys=False,
                attention_floats=self.linear.floats,
            )
        if mixture is None:
            return block
        return replace(
            block,
            mlps=(*mixture.experts, *mixture.shared),
            routers=mixture.routers,
            expert_share=mixture.each / len(mixture.experts),
        )

    @property
    def floats(self) -> tuple[str, ...]:
        """List the linear layers of blocks that stay in float, named below a block."""
        routers = next((mixture.routers for mixture in self.mixtures if mixture is not None), ())
        return (*routers, *(self.linear.floats if self.linear is not None else ()))

    def keeps(self, tensor: str) -> bool:
        """Whether no step changes a tensor of the model, nor its precision."""
        place = split_decoder(tensor)
        return self.linear is not None and place is not None and place[2] in self.linear.kept

    @property
    def fixed_values(self) -> str | None:
        """Say why the values of a head cannot be rotated; None where they can."""
        if self.has_output_gate:
            return "a gate multiplies every channel of what attention gives"
        return None

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
    kinds     what a layer of each kind in `layer_types` has besides; empty where all are alike
    mlp       what a layer without experts has besides
    experts   what the other layers have besides; None where all layers have `mlp`
    is_tied   whether the embedding is the lm_head, too, when the config does not say
    defaults  the values that transformers and vLLM take for keys that the config lacks
    names     what its layers do, for a model that can be quantized, imported and merged with norms
              that differ; None for one of which only the tensors are known
    type      the `model_type` of `config.json`, where there are `names`
    unused    the modules beside the language model that are neither quantized nor copied, with
              what they are
    """

    common: Mapping[str, LayerSpec]
    mlp: Mapping[str, LayerSpec]
    experts: Experts | None = None
    is_tied: bool = False
    defaults: Mapping[str, int | bool] = field(default_factory=dict)
    names: LayerNames | None = None
    type: str = ""
    kinds: Mapping[str, Mapping[str, LayerSpec]] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)


_NORM, _HEAD_NORM = LayerSpec(("hidden",)), LayerSpec(("head",))
_NORMS = {"input_layernorm": _NORM, "post_attention_layernorm": _NORM}
_FOUR_NORMS = _NORMS | {"pre_feedforward_layernorm": _NORM, "post_feedforward_layernorm": _NORM}
_QK_NORMS = {"self_attn.q_norm": _HEAD_NORM, "self_attn.k_norm": _HEAD_NORM}
_BIAS = ("attention_bias",)


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
_COHERE_NAMES: dict[str, Any] = {
    "mlp_norm": "input_layernorm",
    "has_mean_norms": True,
    "has_head": False,
    "neighbor_pairs": True,
}
_GATED_ATTENTION = _QK_NORMS | {
    "self_attn.q_proj": LayerSpec(("gated_query", "hidden")),
    "self_attn.k_proj": LayerSpec(("key", "hidden")),
    "self_attn.v_proj": LayerSpec(("key", "hidden")),
    "self_attn.o_proj": LayerSpec(("hidden", "query")),
}
_LINEAR_HEADS = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
_HYBRID_NAMES: dict[str, Any] = _QK_NORMS_NAMES | {
    "norm_offset": 1.0,
    "is_rope_partial": True,
    "has_output_gate": True,
}
_MTP = {"mtp": "the heads that predict further tokens (MTP)"}


def _linear_attention(**projections: LayerSpec) -> dict[str, LayerSpec]:
    """List the layers of a Gated DeltaNet; `projections` read the stream."""
    return {
        **{f"linear_attn.{name}": spec for name, spec in projections.items()},
        "linear_attn.conv1d": LayerSpec(("linear_qkv", "one", "kernel")),
        "linear_attn.A_log": LayerSpec(("linear_heads",), is_tensor=True),
        "linear_attn.dt_bias": LayerSpec(("linear_heads",), is_tensor=True),
        "linear_attn.norm": LayerSpec(("linear_head",)),
        "linear_attn.out_proj": LayerSpec(("hidden", "linear_value")),
    }


def _linear_names(readers: tuple[str, ...], floats: tuple[str, ...]) -> LinearAttention:
    def below(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"linear_attn.{name}" for name in names)

    return LinearAttention(
        below(readers),
        below(floats),
        norm="linear_attn.norm",
        o="linear_attn.out_proj",
        kept=below(("conv1d.weight", "A_log", "dt_bias")),
    )


_QWEN3_5_KINDS = {
    FULL: _GATED_ATTENTION,
    LINEAR: _linear_attention(
        in_proj_qkv=LayerSpec(("linear_qkv", "hidden")),
        in_proj_z=LayerSpec(("linear_value", "hidden")),
        in_proj_b=LayerSpec(("linear_heads", "hidden")),
        in_proj_a=LayerSpec(("linear_heads", "hidden")),
    ),
}
_QWEN3_5_NAMES: dict[str, Any] = _HYBRID_NAMES | {
    "linear": _linear_names(("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"))
}
_SHARED_EXPERT: dict[str, Any] = {
    "shared": {
        **_mlp("mlp.shared_expert.", "shared_inner"),
        "mlp.shared_expert_gate": LayerSpec(("one", "hidden")),
    },
    "shared_mlps": (_MLP_NAMES.below("mlp.shared_expert"),),
}
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
        names=LayerNames(**_COHERE_NAMES),
        type="cohere",
    ),
    "Cohere2ForCausalLM": Architecture(
        {"input_layernorm": _NORM} | _attention(_BIAS, _BIAS),
        _mlp(),
        is_tied=True,
        names=LayerNames(still_kind=FULL, **_COHERE_NAMES),
        type="cohere2",
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
            **_SHARED_EXPERT,
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
    "Qwen3NextForCausalLM": Architecture(
        _NORMS,
        _mlp(),
        Experts("mlp.gate", "mlp.experts", _mlp("", "expert_inner"), **_SHARED_EXPERT),
        defaults={
            **{"head_dim": 256, "num_key_value_heads": 2, "num_experts_per_tok": 10},
            **_LINEAR_HEADS,
        },
        names=LayerNames(
            linear=_linear_names(("in_proj_qkvz",), ("in_proj_ba",)),
            has_plain_head=True,
            **_HYBRID_NAMES,
        ),
        type="qwen3_next",
        kinds={
            FULL: _GATED_ATTENTION,
            LINEAR: _linear_attention(
                in_proj_qkvz=LayerSpec(("linear_qkvz", "hidden")),
                in_proj_ba=LayerSpec(("two_linear_heads", "hidden")),
            ),
        },
        unused=_MTP,
    ),
    "Qwen3_5ForCausalLM": Architecture(
        _NORMS,
        _mlp(),
        defaults={"head_dim": 256, "num_key_value_heads": 4, **_LINEAR_HEADS},
        names=LayerNames(**_QWEN3_5_NAMES),
        type="qwen3_5_text",
        kinds=_QWEN3_5_KINDS,
        unused=_MTP,
    ),
    "Qwen3_5MoeForCausalLM": Architecture(
        _NORMS,
        {},
        Experts("mlp.gate", "mlp.experts", _mlp("", "expert_inner"), **_SHARED_EXPERT),
        defaults={
            **{"head_dim": 256, "num_key_value_heads": 2, "num_experts_per_tok": 8},
            **_LINEAR_HEADS,
        },
        names=LayerNames(**_QWEN3_5_NAMES),
        type="qwen3_5_moe_text",
        kinds=_QWEN3_5_KINDS,
        unused=_MTP,
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

    What a router and experts read is not listed, because a router is one for all sets. Nor is what
    linear attention reads, of which some layers are one for all sets, too.
    """
    known, place = architecture_of(language_config(config)), split_decoder(norm)
    if known is None or place is None:
        return ()
    if known.names is None:
        return ()
    prefix, index, module = place
    kinds = layer_kinds(known, language_config(config), index + 1) if known.kinds else ()
    block = replace(known.names, kinds=tuple(kinds)).of_block(index)
    norms = block.norms
    if known.experts is not None:
        norms = {"input_layernorm": block.attention}
    if block.attention_norm is not None and block.attention_floats:
        del norms[block.attention_norm]
    return tuple(f"{prefix}{index}.{reader}" for reader in norms.get(module, ()))


def layer_kinds(model: Architecture, config: Mapping[str, Any], layers: int) -> list[str]:
    """Read the kinds of the first `layers` decoder layers of a hybrid model, FULL or LINEAR.

    Raises FormatError for `layer_types` that are not known, or fewer.
    """
    found = config.get("layer_types")
    if found is None:
        every = config.get("full_attention_interval", 4)
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise FormatError(
                f"{CONFIG}: full_attention_interval: {shown(every)} is no count; {REMEDY}"
            )
        return [LINEAR if (i + 1) % every else FULL for i in range(layers)]
    if not isinstance(found, list) or len(found) < layers:
        raise FormatError(
            f"{CONFIG}: layer_types: {shown(found)} is no list with a kind for each of {layers} "
            f"layers; {REMEDY}"
        )
    for kind in found:
        if not isinstance(kind, str) or kind not in model.kinds:
            raise FormatError(
                f"{CONFIG}: layer_types: {shown(kind)} is not known; known are "
                f"{', '.join(model.kinds)}; {REMEDY}"
            )
    return found[:layers]


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
