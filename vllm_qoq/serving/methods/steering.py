"""Which set the steps of an engine in this process run in, changed while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vllm_qoq.routing.table import Routing
from vllm_qoq.serving.methods.routed_experts import FlexMoEMethod
from vllm_qoq.serving.methods.routed_linear import FlexLinearMethod


class Steering:
    """The routed layers of a model that runs eagerly in this process.

    linears  the method of each linear layer, in the order of the model
    experts  the method of each mixture of experts
    """

    def __init__(self, model: nn.Module) -> None:
        found = [getattr(module, "quant_method", None) for module in model.modules()]
        self.linears = [method for method in found if isinstance(method, FlexLinearMethod)]
        self.experts = [method for method in found if isinstance(method, FlexMoEMethod)]

    def follow(self, routing: Routing) -> None:
        """Let every layer follow `routing` from the next step on."""
        methods: list[FlexLinearMethod | FlexMoEMethod] = [*self.linears, *self.experts]
        methods[0].policy.use(routing)
        for method in methods:
            method.follow_policy()


def reaching(sets: Sequence[str]) -> dict[str, Any]:
    """Make a routing with a row for every set, so that every set is loaded."""
    *others, last = sets
    rows = [{"max_batch": batch, "set": name} for batch, name in enumerate(others, 1)]
    return {"prefill": sets[0], "decode": [*rows, {"set": last}]}
