"""The parts of a model's `config.json` that the tools read: its class, and what is nested."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONFIG = "config.json"


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Find the part of a `config.json` that describes the language model."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def architecture_name(config: Mapping[str, Any]) -> str | None:
    """Read the class of the model, `LlamaForCausalLM`; None where `config.json` names none."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        return None
    return names[0]
