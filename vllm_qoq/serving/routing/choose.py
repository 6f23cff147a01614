"""The choice of a layer's set in a step, also where only the device knows the load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from vllm_qoq.routing.table import LayerRoute, Step
from vllm_qoq.serving.routing.policy import Policy


class _Choice(Protocol):
    """How one set computes a layer."""

    @property
    def base(self) -> str | None:
        """The set to whose weights this one adds a residual."""


def choose(
    route: LayerRoute, step: Step, sets: Mapping[str, _Choice], policy: Policy
) -> tuple[str, torch.Tensor | None]:
    """Choose the set of `step`.

    Where only the device knows the state, it is a nested set, with the flag that says whether the
    whole set is meant or its base alone: int32 [1] on the device.
    """
    if step.is_busy is not None:
        return route.choose(step), None
    calm, busy = route.pair(step)
    if calm == busy:
        return calm, None
    load = policy.load
    assert load is not None
    return (calm, load.is_calm) if sets[calm].base == busy else (busy, load.is_busy)
