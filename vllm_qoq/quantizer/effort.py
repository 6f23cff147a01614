"""Efforts: names for how much time a quantization may take, each for a few options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Effort = Literal["fast", "default", "best"]

EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {"samples": 16, "passes": 1},
    "default": {"samples": 128, "passes": 3},
    "best": {"samples": 512, "passes": 3},
}
"""Effort -> options; what is not in it is the default of the option. Explicit options win."""


def of_options(options: Mapping[str, Any]) -> str | None:
    """Name the effort whose options are all among `options`; None where single ones differ."""
    for name, preset in EFFORTS.items():
        if preset.items() <= options.items():
            return name
    return None
