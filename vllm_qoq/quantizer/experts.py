"""Mixtures of experts as modules with a linear layer for each projection of each expert.

transformers keeps the experts of a mixture as two tensors of three dimensions. Here each of them
has layers of its own, which are named as in the checkpoint and share the memory of these tensors.
So an expert is seen by hooks, changed and replaced like any other layer, with the tokens that the
router sends to it and no others.
"""

from __future__ import annotations

import torch
from torch import nn

from vllm_qoq.models.blocks import Mlp
from vllm_qoq.models.names import split_expert
from vllm_qoq.models.table import LayerNames
from vllm_qoq.quantizer.model import Module, blocks

_MLP = "mlp"  # the name of a mixture in a block of transformers, whatever checkpoints call it


class LinearExperts(nn.Module):
    """The experts of a mixture, in place of transformers' module, whose weights they share.

    mlp  the names of an expert's layers, below it
    """

    def __init__(self, fused: Module, mlp: Mlp) -> None:
        super().__init__()
        self._mlp, self.act_fn = mlp, fused.act_fn
        stacked = zip(fused.gate_up_proj.detach(), fused.down_proj.detach(), strict=True)
        for number, (gate_up, down) in enumerate(stacked):
            expert = nn.Module()
            gate, up = gate_up.chunk(2)
            for name, weight in ((mlp.gate, gate), (mlp.up, up), (mlp.down, down)):
                expert.add_module(name, _linear(weight))
            self.add_module(str(number), expert)
        self._count = len(fused.down_proj)

    def forward(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Add up what the experts of each token make of it, [tokens, hidden].

        hidden         float [tokens, hidden]
        top_k_index    int64 [tokens, experts of a token]
        top_k_weights  float [tokens, experts of a token]
        """
        each = top_k_index.shape[1]
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=self._count).tolist()
        weights = top_k_weights.flatten()[order]
        total = torch.zeros_like(hidden)
        first = 0
        for number, count in enumerate(counts):
            last = first + count
            if count:
                tokens = order[first:last] // each
                y = self._compute(number, hidden[tokens]) * weights[first:last, None]
                total.index_add_(0, tokens, y.to(total.dtype))
            first = last
        return total

    def _compute(self, number: int, x: torch.Tensor) -> torch.Tensor:
        expert: Module = self.get_submodule(str(number))
        leaves = (self._mlp.gate, self._mlp.up, self._mlp.down)
        gate, up, down = (getattr(expert, leaf) for leaf in leaves)
        y: torch.Tensor = down(self.act_fn(gate(x)) * up(x))
        return y


def use_linear_experts(model: Module, names: LayerNames) -> None:
    """Replace the mixtures of experts of `model` by modules whose layers have the `names`."""
    for block, mixture in zip(blocks(model, names), names.mixtures, strict=False):
        if mixture is None:
            continue
        first = mixture.experts[0]
        place = split_expert(first.gate)
        assert place is not None
        parent, _, experts = place[0].rpartition(".")
        leaves = Mlp(*(name.rpartition(".")[2] for name in (first.gate, first.up, first.down)))
        module = block.get_submodule(_MLP)
        module.set_submodule(experts, LinearExperts(module.get_submodule(experts), leaves))
        if parent != _MLP:
            # It is registered under the checkpoint's name alone; the block's code finds it by both.
            delattr(block, _MLP)
            block.add_module(parent, module)
            object.__setattr__(block, _MLP, module)


def _linear(weight: torch.Tensor) -> nn.Linear:
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
