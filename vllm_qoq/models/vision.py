"""Models of images and text: the language model that is in one, and the names of its parts.

Such a model is a language model of the table, into whose stream a vision tower writes through a
projector. It is known by its language model: `language_config` makes the `config.json` that this
would have by itself, and `language_name` the names of its tensors. Everything else stays in float.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_qoq.errors import FormatError, shown
from vllm_qoq.models.config import CONFIG, architecture_name, text_config

TOWERS = ("visual", "vision_tower", "multi_modal_projector")
"""The modules beside a language model: towers, and projectors from them into its stream."""

_TIED = "tie_word_embeddings"
_INNER = "model.language_model."
_PARTS, _ROPES = ("text_config", "vision_config"), ("rope_parameters", "rope_scaling")
_SECTION_KEYS = ("mrope_section", "mrope_interleaved")
_REMEDY = "mend it, or download the model again"
# Where a checkpoint may have the language model, by what that is called in a model of its own;
# older ones have it where vLLM does.
_OUTER = ((_INNER, "model."), ("language_model.model.", "model."), ("language_model.", ""))


@dataclass(frozen=True, slots=True)
class VisionLanguage:
    """A kind of model of images and text.

    type         the `model_type` of the whole model
    languages    the `model_type` of its text_config -> class and `model_type` of a language model
                 that computes the same of texts
    writers      globs of the modules that write to the stream, below the model
    tower_types  every `model_type` that its vision_config may have; older files of Qwen have there
                 that of the whole model
    """

    type: str
    languages: Mapping[str, tuple[str, str]]
    writers: tuple[str, ...]
    tower_types: tuple[str, ...]


VISION_LANGUAGE: Mapping[str, VisionLanguage] = {
    "Qwen2_5_VLForConditionalGeneration": VisionLanguage(
        "qwen2_5_vl",
        dict.fromkeys(("qwen2_5_vl_text", "qwen2_5_vl"), ("Qwen2ForCausalLM", "qwen2")),
        ("visual.merger.mlp.2",),
        ("qwen2_5_vl", "qwen2_5_vl_vision"),
    ),
    "LlavaForConditionalGeneration": VisionLanguage(
        "llava",
        {"llama": ("LlamaForCausalLM", "llama"), "qwen2": ("Qwen2ForCausalLM", "qwen2")},
        ("multi_modal_projector.linear_2",),
        ("clip_vision_model", "siglip_vision_model", "pixtral"),
    ),
    "Qwen3VLForConditionalGeneration": VisionLanguage(
        "qwen3_vl",
        {"qwen3_vl_text": ("Qwen3ForCausalLM", "qwen3")},
        ("visual.merger.linear_fc2", "visual.deepstack_merger_list.*.linear_fc2"),
        ("qwen3_vl", "qwen3_vl_vision"),
    ),
    "Qwen3_5ForConditionalGeneration": VisionLanguage(
        "qwen3_5",
        {"qwen3_5_text": ("Qwen3_5ForCausalLM", "qwen3_5_text")},
        ("visual.merger.linear_fc2",),
        ("qwen3_5", "qwen3_5_vision"),
    ),
    "Qwen3_5MoeForConditionalGeneration": VisionLanguage(
        "qwen3_5_moe",
        {"qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text")},
        ("visual.merger.linear_fc2",),
        ("qwen3_5_moe", "qwen3_5_moe_vision"),
    ),
}
"""Every model of images and text whose language model can be quantized, by class name.

Older files of Qwen2.5-VL have no text_config, and the type of the whole model.
"""


def vision_language(config: Mapping[str, Any]) -> VisionLanguage | None:
    """Find the entry of the table for a `config.json`; None for any other model."""
    return VISION_LANGUAGE.get(architecture_name(config) or "")


def tower_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Name the modules beside the language model; none for a model of text alone."""
    return TOWERS if vision_language(config) is not None else ()


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Make the config of the language model in a model of images and text; any other stays.

    What its text_config lacks is what the whole model says. Three equal positions of a token, as
    a text has, turn a head as one does, so sections of RoPE are left out. Raises FormatError for a
    language model that is not known.
    """
    known = vision_language(config)
    if known is None:
        return config
    _check_nesting(config, known)
    text, kind = text_config(config), text_config(config).get("model_type")
    if not isinstance(kind, str) or kind not in known.languages:
        raise FormatError(
            f"{CONFIG}: text_config.model_type: {shown(kind)} is not supported in "
            f"{architecture_name(config)}; supported are {', '.join(known.languages)}"
        )
    ties = {shown(part[_TIED]) for part in (config, text) if part.get(_TIED) is not None}
    if len(ties) > 1:
        raise FormatError(
            f"{CONFIG}: {_TIED}: the model and its text_config say different things; {_REMEDY}"
        )
    name, own_kind = known.languages[kind]
    if own_kind != kind and text.get("rms_norm_eps") is None:
        # The class that stands for this one has another default.
        raise FormatError(f"{CONFIG}: rms_norm_eps: missing; {_REMEDY}")
    outer = {k: v for k, v in config.items() if not isinstance(v, dict) or k not in _PARTS}
    tied = {_TIED: config[_TIED]} if config.get(_TIED) is not None else {}
    inner = {key: _rope(value) if key in _ROPES else value for key, value in text.items()}
    inner.pop("vision_config", None)
    return {**outer, **inner, **tied, "architectures": [name], "model_type": own_kind}


def _check_nesting(config: Mapping[str, Any], known: VisionLanguage) -> None:
    """Raise FormatError unless there is a text_config, or its keys beside it, as in old files."""
    text = config.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise FormatError(f"{CONFIG}: text_config: {shown(text)} is not an object; {_REMEDY}")
    is_flat = known.type in known.languages and config.get("hidden_size") is not None
    if text is None and not is_flat:
        raise FormatError(f"{CONFIG}: text_config: missing; {_REMEDY}")


def _rope(value: object) -> object:
    """Leave sections out of the parameters of RoPE; None where nothing but them is said."""
    if not isinstance(value, dict):
        return value
    kept = {key: entry for key, entry in value.items() if key not in _SECTION_KEYS}
    for key in ("type", "rope_type"):
        if kept.get(key) == "mrope":
            kept[key] = "default"
    return kept


def language_name(name: str) -> str | None:
    """Name a tensor or layer of a model of images and text as its language model does by itself.

    None for what is beside that.
    """
    if name.removeprefix("model.").partition(".")[0] in TOWERS:
        return None
    for outer, inner in _OUTER:
        if name.startswith(outer):
            return inner + name.removeprefix(outer)
    return name


def whole_name(name: str) -> str:
    """Name what `language_name` named in the whole model, as transformers and vLLM read it."""
    is_inner = name.startswith("model.") and language_name(name) is not None
    return _INNER + name.removeprefix("model.") if is_inner else name


def outer_prefix(name: str, stored: str) -> str:
    """Find what a checkpoint has for the `model.` of a tensor that it calls `stored`.

    name  what its language model by itself calls the tensor, `model.norm.weight`
    """
    rest = name.removeprefix("model.")
    prefixes = (outer for outer, inner in _OUTER if inner == "model.")
    return next((one for one in prefixes if stored.endswith(one + rest)), "model.")


def stored_pattern(name: str) -> str:
    """Make a regular expression of what a checkpoint may call a layer that vLLM calls `name`."""
    inner = language_name(name)
    if inner == name or inner is None or not inner.startswith("model."):
        return re.escape(name)
    prefixes = (re.escape(outer) for outer in (_INNER, "language_model.model.", "model."))
    return f"(?:{'|'.join(prefixes)}){re.escape(inner.removeprefix('model.'))}"
