"""Which decoder layers lose most in a set, by the errors that `vllm-qoq quantize` reports."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from glob import escape

from vllm_qoq.routing.table import DecodeRow, LayerRule

_BLOCK = re.compile(r"(.+?\.\d+)\.")


def block_of(layer: str) -> str | None:
    """Name the decoder layer that a linear layer is part of; None where it is part of none."""
    block = _BLOCK.match(layer)
    return block[1] if block else None


def losses(
    errors: Iterable[tuple[str, str, float]], set_name: str, best: str | None
) -> dict[str, float]:
    """Rank decoder layers by what they lose in a set, beyond the most accurate one; most first.

    errors    (layer, set, output error) of the report
    set_name  the set
    best      the most accurate set; None where there is but one

    The loss is the mean over the linear layers of the squared output error, less that of `best`.
    """
    lost: dict[str, list[float]] = defaultdict(list)
    for layer, owner, error in errors:
        sign = {best: -1, set_name: 1}.get(owner, 0)
        if sign and (block := block_of(layer)) is not None:
            lost[block].append(sign * error**2)
    means = {block: sum(each) / len(each) for block, each in lost.items()}
    return dict(sorted(means.items(), key=lambda item: (-item[1], item[0])))


def rule(block: str, set_name: str) -> LayerRule:
    """Make the rule by which a decoder layer generates in a set."""
    return LayerRule(match=f"{escape(block)}.*", decode=(DecodeRow(set_name=set_name),))
