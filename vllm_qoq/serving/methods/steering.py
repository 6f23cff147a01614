"""Which set the steps of an engine in this process run in, changed while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vllm_qoq.routing.table import Routing
from vllm_qoq.serving.methods.routed_linear import FlexLinearMethod


class Steering:
    """The routed layers of a model that runs eagerly in this process.

    methods  one a layer, in the order of the model
    """

    def __init__(self, model: nn.Module) -> None:
        found = (getattr(module, "quant_method", None) for module in model.modules())
        self.methods = [method for method in found if isinstance(method, FlexLinearMethod)]

    def follow(self, routing: Routing) -> None:
        """Let every layer follow `routing` from the next step on."""
        self.methods[0].policy.use(routing)
        for method in self.methods:
            method.follow_policy()


def reaching(sets: Sequence[str]) -> dict[str, Any]:
    """Make a routing with a row for every set, so that every set is loaded."""
    *others, last = sets
    rows = [{"max_batch": batch, "set": name} for batch, name in enumerate(others, 1)]
    return {"prefill": sets[0], "decode": [*rows, {"set": last}]}
