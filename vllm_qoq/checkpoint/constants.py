"""Checks of the numbers in config.json that are no sizes.

With a wrong one a model loads and talks nonsense.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from vllm_qoq.errors import shown
from vllm_qoq.models.config import CONFIG, text_config

_REMEDY = "mend it, or download the model again"
_LONGEST_CONTEXT = 1 << 31


def findings(config: Mapping[str, Any]) -> Iterator[str]:
    """Find numbers that cannot be in a `config.json` or its text_config; keys may be absent."""
    text = text_config(config)
    epsilon = text.get("rms_norm_eps")
    if epsilon is not None and not (is_finite(epsilon) and 0 <= epsilon < 1):
        yield f"{CONFIG}: rms_norm_eps: {shown(epsilon)} is not a number from 0 to 1; {_REMEDY}"
    longest = text.get("max_position_embeddings")
    if longest is not None and (type(longest) is not int or not 0 < longest < _LONGEST_CONTEXT):
        yield (
            f"{CONFIG}: max_position_embeddings: {shown(longest)} is not a number of tokens; "
            f"{_REMEDY}"
        )
    rope = text.get("rope_parameters")
    places = {"rope_theta": text, "rope_parameters.rope_theta": rope}
    for key, place in places.items():
        theta = place.get("rope_theta") if isinstance(place, dict) else None
        if theta is not None and not is_positive(theta):
            yield f"{CONFIG}: {key}: {shown(theta)} is not a positive number; {_REMEDY}"


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a value of a JSON file is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False


def is_positive(value: object) -> TypeGuard[float]:
    """Whether a value of a JSON file is a finite number above 0."""
    return is_finite(value) and value > 0
