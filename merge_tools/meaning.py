"""The config.json of a model in one spelling, so that two can be compared by what they mean.

transformers 4 and 5, and tools that save through one of them, write the same model differently:
other names (`torch_dtype`, `rope_theta` and `rope_scaling` for what is now `rope_parameters`),
defaults present or absent, keys that matter to training or to transformers' own generation alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from vllm_qoq.checkpoint.format import SECTION

# What a model computes when it is served does not depend on these.
_IGNORED = frozenset(
    {
        *(SECTION, "compression_config", "dtype", "torch_dtype", "tie_word_embeddings"),
        *("_name_or_path", "name_or_path", "transformers_version", "auto_map", "_commit_hash"),
        *("use_cache", "cache_implementation", "pretraining_tp", "torchscript", "return_dict"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
        *("initializer_range", "gradient_checkpointing", "use_bfloat16", "problem_type"),
        *("output_attentions", "output_hidden_states", "output_scores", "pruned_heads"),
        *("return_dict_in_generate", "chunk_size_feed_forward", "is_decoder", "prefix"),
        *("is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size"),
        *("tie_encoder_decoder", "tf_legacy_loss", "task_specific_params", "tokenizer_class"),
        *("id2label", "label2id", "finetuning_task", "pad_token_id", "bos_token_id"),
        *("sep_token_id", "decoder_start_token_id", "unsloth_version", "unsloth_fixed"),
        *("do_sample", "early_stopping", "temperature", "top_k", "top_p", "typical_p"),
        *("max_length", "min_length", "num_beams", "num_beam_groups", "num_return_sequences"),
        *("repetition_penalty", "length_penalty", "diversity_penalty", "remove_invalid_values"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
        *("begin_suppress_tokens", "suppress_tokens", "exponential_decay_length_penalty"),
        *("forced_bos_token_id", "forced_eos_token_id"),
    }
)
_TRAINING = re.compile(r".*(dropout|_pdrop|_drop|aux_loss_coef|layerdrop)$|^output_router_logits$")
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
_ROPE_TYPES = {"su": "longrope", "mrope": "default"}


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrite a config in one spelling, without what does not matter; nested configs too."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if key in _IGNORED or key in _ROPE or _TRAINING.fullmatch(key) or value is None:
            continue
        kept[key] = normal(value) if isinstance(value, dict) else value
    if rope := _rope(config):
        kept["rope_parameters"] = rope
    if isinstance(kept.get("eos_token_id"), list):
        tokens = kept["eos_token_id"]
        kept["eos_token_id"] = tokens[0] if len(tokens) == 1 else tokens
    _drop_derived(kept)
    return kept


def default(config: Mapping[str, Any], key: str) -> object:
    """The value that transformers takes for a key the config lacks; None where it is unknown."""
    kind = config.get("model_type")
    values = _defaults(kind) if isinstance(kind, str) else {}
    return normal(values).get(key, values.get(key))


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether lm_head is the embedding, as transformers reads the config and vLLM with it."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return bool(default(config, "tie_word_embeddings"))


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `rope_parameters` of transformers 5, put together from older keys if need be."""
    found = config.get("rope_parameters")
    if not isinstance(found, dict):
        scaling = config.get("rope_scaling")
        found = dict(scaling) if isinstance(scaling, dict) else {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if config.get(key) is not None and not any(isinstance(v, dict) for v in found.values()):
            found = {key: config[key], **found}
    if not found:
        return {}
    if any(isinstance(value, dict) for value in found.values()):
        return {
            kind: _rope({"rope_parameters": part}) if isinstance(part, dict) else part
            for kind, part in found.items()
            if part is not None
        }
    rope = {key: value for key, value in found.items() if value is not None and key != "type"}
    kind = found.get("rope_type", found.get("type")) or "default"
    rope["rope_type"] = _ROPE_TYPES.get(kind, kind) if isinstance(kind, str) else kind
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    if rope["rope_type"] == "default":
        rope.pop("factor", None)
    return rope


def _drop_derived(kept: dict[str, Any]) -> None:
    """Leave out what follows from other keys, because only some versions write it."""
    hidden: Any = kept.get("hidden_size")
    heads: Any = kept.get("num_attention_heads")
    if kept.get("num_key_value_heads") == heads:
        kept.pop("num_key_value_heads", None)
    are_sizes = isinstance(hidden, int) and isinstance(heads, int) and heads > 0
    if are_sizes and kept.get("head_dim") == hidden // heads:
        del kept["head_dim"]
    if kept.get("use_sliding_window") is False:
        for key in ("sliding_window", "max_window_layers", "use_sliding_window"):
            kept.pop(key, None)
    types = kept.get("layer_types")
    if isinstance(types, list) and all(kind == "full_attention" for kind in types):
        del kept["layer_types"]
    for key in ("attention_bias", "mlp_bias"):
        if kept.get(key) is False:
            del kept[key]


@lru_cache(maxsize=8)
def _defaults(model_type: str) -> Mapping[str, Any]:
    if find_spec("transformers") is None:
        return {}
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return dict(CONFIG_MAPPING[model_type]().to_dict())
    except Exception:  # transformers does not know the model, or it has no defaults
        return {}
