"""The `config.json` of a checkpoint that we write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_qoq.checkpoint.folder import CODE_KEYS
from vllm_qoq.checkpoint.format import SECTION, KVSection, Section


def output_config(
    config: Mapping[str, Any], section: Section | KVSection, dtype: str | None = None
) -> dict[str, Any]:
    """Make the `config.json` of an output: the model's with our section.

    Left out are the sections of other methods and keys that name code.

    dtype  the dtype in which the model runs, `bfloat16`, `float16` or `float32`; None to leave it
    """
    kept = {key: value for key, value in config.items() if key not in CODE_KEYS}
    kept.pop("compression_config", None)
    text = kept.get("text_config")
    if isinstance(text, dict) and SECTION in text:
        kept["text_config"] = {key: value for key, value in text.items() if key != SECTION}
    kept = _with_dtype(kept, dtype) if dtype is not None else kept
    return {**kept, SECTION: section.to_json()}


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Set the dtype of a config, under the name that it uses already; nested configs too."""
    changed = dict(config)
    for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
        changed[key] = dtype
    for key, part in config.items():
        if isinstance(part, dict) and {"dtype", "torch_dtype"} & part.keys():
            changed[key] = _with_dtype(part, dtype)
    return changed
