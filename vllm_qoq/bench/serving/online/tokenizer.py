"""A tokenizer for models with dummy weights, in which every token is a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILES = ("tokenizer.json", "tokenizer_config.json")
"""The files that `write_tokenizer` writes."""
# vLLM refuses a prompt with more characters than its tokens can have by the longest of them, and
# does not count the spaces between them. This word is longer than any other with its space.
_UNKNOWN = "unknown-to-this-vocabulary"


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a tokenizer of `vocabulary` words, so that any tokens can be written as text.

    The text of tokens 5 and 7 is "t5 t7", and is those two tokens again.
    """
    words = {_UNKNOWN: 0} | {f"t{i}": i for i in range(1, vocabulary)}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": _UNKNOWN},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": _UNKNOWN}
    for name, content in zip(FILES, (tokenizer, config), strict=True):
        (folder / name).write_text(json.dumps(content) + "\n", encoding="utf-8")
