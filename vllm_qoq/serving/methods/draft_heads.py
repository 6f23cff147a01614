"""Heads that draft, trained on the original model, beside a model whose stream is rotated.

With R the rotation and g the weight of the original final norm, which is a part of the rotated
lm_head, a head takes from the model, and gets

    hidden states after the final norm (EAGLE, MTP, Medusa)     g * (hidden @ R.T)
    the stream between layers (EAGLE-3), embeddings of images   stream @ R.T
    rows of the model's embedding, if it shares that            row @ R.T
    logits of the model's lm_head, if it shares that            lm_head((hidden / g) @ R)

What is shared stays one tensor. Each is a product with one matrix [H, H], which all ranks hold. The
first two are computed where vLLM hands a step's states to what drafts: between the graphs of the
model and those of the head. The other two are modules of the head, and so parts of its graphs.

vLLM has no hook for this, so the two methods of the object that drafts, the same in both model
runners, are wrapped, for that one object.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from vllm_qoq.checkpoint.format import STREAM
from vllm_qoq.errors import UserError
from vllm_qoq.serving.methods.hidden_states import REMEDY, check_shared_head
from vllm_qoq.serving.methods.original_basis import OriginalBasis
from vllm_qoq.serving.vllm_versions import HandedToDrafter, drafter_in_the_making, handed_to


class Drafter(Protocol):
    """What drafts in vLLM: a proposer of the first model runner, a speculator of the second."""

    model: nn.Module
    load_model: Callable[..., Any]
    propose: Callable[..., Any]


def serve(target: nn.Module, basis: OriginalBasis) -> None:
    """Turn all that what drafts for the model `target`, which is being built, takes from it.

    Raises UserError where nothing is found that drafts.
    """
    drafter: Drafter | None = drafter_in_the_making()
    handed = handed_to(drafter) if drafter is not None else None
    if drafter is None or handed is None:
        raise UserError(
            "--speculative-config: the hidden states of this checkpoint are rotated, and what "
            f"drafts with them was not found in this version of vLLM; {REMEDY}"
        )
    load, propose = drafter.load_model, drafter.propose
    signature = inspect.signature(propose)

    def load_and_turn(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        turn_shared(drafter.model, target, basis)

    def turn_and_propose(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        _turn_handed(bound.arguments, handed, basis)
        return propose(*bound.args, **bound.kwargs)

    drafter.load_model, drafter.propose = load_and_turn, turn_and_propose


def turn_shared(head: nn.Module, target: nn.Module, basis: OriginalBasis) -> None:
    """Exchange the modules that `head` shares with `target` for those of the original basis.

    Raises UserError for a module that is neither an embedding nor an lm_head, and for an lm_head
    from which the norm's weight cannot be divided out.
    """
    of_target = {id(module) for module in target.modules()}
    own = [(name, module) for name, module in head.named_modules() if id(module) not in of_target]
    for path, parent in own:
        for name, child in list(parent.named_children()):
            # What has buffers alone does not depend on the basis: vLLM keeps one RoPE for all.
            if id(child) in of_target and next(child.parameters(), None) is not None:
                parent.add_module(name, _turned(child, basis, f"{path}.{name}".lstrip(".")))


def _turned(shared: nn.Module, basis: OriginalBasis, place: str) -> nn.Module:
    layer = getattr(shared, "base_layer", shared)  # without the adapters, which are of the target
    if isinstance(layer, ParallelLMHead):
        if basis.is_tracked:  # else the norm may be random numbers
            check_shared_head(basis.norm, f"{STREAM}.norm")
        return original_head(layer, basis)
    if isinstance(layer, VocabParallelEmbedding):
        return OriginalEmbedding(layer, basis)
    raise UserError(
        f"--speculative-config: the head takes {place} ({type(layer).__name__}) from the model, "
        f"whose stream is rotated; {REMEDY}"
    )


class OriginalEmbedding(nn.Module):
    """The embedding of the original model, made of the rows of the rotated model's."""

    def __init__(self, rotated: VocabParallelEmbedding, basis: OriginalBasis) -> None:
        super().__init__()
        self.rotated, self.stream = rotated, basis

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Look up tokens [...]; returns rows [..., H]."""
        return self.stream.stream(self.rotated(tokens))


def original_head(rotated: ParallelLMHead, basis: OriginalBasis) -> ParallelLMHead:
    """Make the lm_head of the original model: the rotated model's, which turns its inputs.

    vLLM asks an lm_head for its method and its shards, so this is another view of the same layer.
    """
    head = copy.copy(rotated)
    head._modules = {**rotated._modules, STREAM: basis}
    head.quant_method = _HeadMethod(rotated.quant_method)
    return head


class _HeadMethod(QuantizeMethodBase):
    """The method of an lm_head, with hidden states of the original model."""

    def __init__(self, rotated: QuantizeMethodBase) -> None:
        self._rotated = rotated

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Raise NotImplementedError: the weights are those of the rotated model's lm_head."""
        raise NotImplementedError

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute logits [num_tokens, this rank's vocabulary] of x [num_tokens, H], like x."""
        basis = layer.get_submodule(STREAM)
        assert isinstance(basis, OriginalBasis)
        logits: torch.Tensor = self._rotated.apply(layer, basis.head_input(x), bias=bias)
        return logits


def _turn_handed(arguments: dict[str, Any], handed: HandedToDrafter, basis: OriginalBasis) -> None:
    """Turn, in the `arguments` of `propose`, what comes from the model."""
    streams = arguments.get(handed.streams) if handed.streams else None
    if handed.streams and streams is not None:
        is_list = isinstance(streams, list)
        turned = [basis.stream(one) for one in (streams if is_list else [streams])]
        arguments[handed.streams] = turned if is_list else turned[0]
    elif handed.hidden:
        arguments[handed.hidden] = basis(arguments[handed.hidden])
    if (images := arguments.get(handed.images)) is not None:
        embeddings, is_image = images
        arguments[handed.images] = [basis.stream(one) for one in embeddings], is_image
