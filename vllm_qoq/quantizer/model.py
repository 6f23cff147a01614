"""The model that is quantized: the names of its layers, its dimensions and its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_qoq.checkpoint.format import SECTION
from vllm_qoq.errors import shown
from vllm_qoq.models.config import CONFIG
from vllm_qoq.models.mixtures import names_of
from vllm_qoq.models.table import ARCHITECTURES, Architecture, LayerNames, with_names
from vllm_qoq.models.tensors import EMBEDDING, expected_tensors
from vllm_qoq.models.vision import VISION_LANGUAGE
from vllm_qoq.quantizer import QuantizeError

_CAP = "attn_logit_softcapping"
# What well-known models compute that no entry of the table has, by their model_type.
_UNKNOWN = {
    **dict.fromkeys(
        ("llama4", "llama4_text"),
        "experts that are one product and whose inputs the router weights, nor for norms of keys "
        "behind RoPE",
    ),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), "attention over compressed keys (MLA)"),
    "gpt_oss": "experts with biases",
    **dict.fromkeys(
        ("bamba", "falcon_h1", "granitemoehybrid", "jamba", "nemotron_h", "zamba2"), "Mamba layers"
    ),
    **dict.fromkeys(("lfm2", "lfm2_moe"), "layers that are short convolutions"),
    "olmo_hybrid": "norms that are in other places in layers of another kind",
}


def layer_names(config: Mapping[str, Any]) -> LayerNames:
    """Look up what the layers of a model are called; QuantizeError if it is not supported.

    Raises FormatError for sizes of a mixture of experts that cannot be.
    """
    if config.get(SECTION) is not None:
        raise QuantizeError("the model is quantized already; give the one in bf16 or fp16")
    classes, kind = _classes(), config.get("model_type")
    for name, model in VISION_LANGUAGE.items():
        if kind == model.type:  # of a whole model, which `language_config` did not know by its name
            raise QuantizeError(
                f"{CONFIG}: architectures: {shown(config.get('architectures'))} cannot be "
                f"quantized; a model of type {kind!r} must be [{name!r}], so give one that is, or "
                "write that there if it is only said wrongly"
            )
    if not isinstance(kind, str) or kind not in classes:
        lacks = _UNKNOWN.get(kind) if isinstance(kind, str) else None
        because = f", because there are no steps for {lacks}" if lacks is not None else ""
        raise QuantizeError(
            f"{CONFIG}: model_type {shown(kind)} is not supported{because}; supported are "
            f"{', '.join(classes)}, and the language models in {', '.join(VISION_LANGUAGE)}"
        )
    if config.get("architectures", [classes[kind]]) not in (None, [classes[kind]]):
        raise QuantizeError(
            f"{CONFIG}: architectures: {shown(config.get('architectures'))} cannot be quantized; "
            f"a model of type {kind!r} must be [{classes[kind]!r}], the language model alone, so "
            "give that one"
        )
    names = names_of({**config, "architectures": [classes[kind]]})
    assert names is not None
    return _with_caps(names, config)


def _with_caps(names: LayerNames, config: Mapping[str, Any]) -> LayerNames:
    """Say that scores are not capped where the config says so, by a null."""
    is_uncapped = config.get(_CAP, names.has_capped_scores) is None
    return replace(names, has_capped_scores=False) if is_uncapped else names


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a model that the steps need."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Dimensions:
        """Read config.json, with the defaults of transformers; FormatError for what is no size."""
        classes = _classes()
        model = expected_tensors({**config, "architectures": [classes[config["model_type"]]]})
        kv_heads, head_dim = model.key_heads
        return cls(
            hidden=model[EMBEDDING][1],
            layers=model.layers,
            heads=config["num_attention_heads"],
            kv_heads=kv_heads,
            head_dim=head_dim,
        )

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.kv_heads


Module = Any
"""An `nn.Module`, untyped: mypy takes each attribute of one for either a tensor or a module."""


def blocks(model: Module, names: LayerNames) -> list[Module]:
    """List the decoder blocks in order."""
    return list(model.get_submodule(names.blocks).children())


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Find the entry of the table for the `config.json` of a model that `layer_names` knows."""
    return ARCHITECTURES[_classes()[config["model_type"]]]


def _classes() -> dict[str, str]:
    """Map the model_type of `config.json` to the class by which vLLM chooses the model.

    The class is needed because classifiers, rewards and embeddings share the model_type.
    """
    return {ARCHITECTURES[name].type: name for name in with_names()}
