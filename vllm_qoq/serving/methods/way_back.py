"""The way back of a model that is being built: from its rotated stream to what was made for it.

The checkpoint's rotation and the weight of the original final norm are loaded into a module of the
root of the model. For a pooling model a forward hook of the root turns what it returns: outside
what vLLM compiles, and inside what its CUDA graphs capture. For a head that drafts, what is turned
is what vLLM gives to it (`draft_heads`).
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, model_parallel_is_initialized

from vllm_qoq.checkpoint.format import STREAM, Section
from vllm_qoq.errors import UserError
from vllm_qoq.serving.methods import draft_heads
from vllm_qoq.serving.methods.hidden_states import (
    REMEDY,
    drafts_with_head,
    is_pooling,
    reads_lm_head,
)
from vllm_qoq.serving.methods.original_basis import OriginalBasis
from vllm_qoq.serving.methods.weight_set import UNTRACKED_LOADERS

_POOLER = "pooler"


def way_back(
    section: Section, vllm_config: VllmConfig, root: nn.Module | None, prefix: str
) -> WayBack | None:
    """Make the way back for the model `root`, which is being built; None where none is needed.

    prefix  a layer of the model, for messages
    """
    if drafts_with_head(section, vllm_config):
        return ToHead(vllm_config, root, prefix)
    is_stored = section.stream is not None and section.stream.is_stored
    if not is_stored or not is_pooling(vllm_config) or reads_lm_head(vllm_config):
        return None
    return ToPooler(vllm_config, root, prefix)


class WayBack(ABC):
    """A module of the root of a model with the basis, and what uses it."""

    def __init__(self, vllm_config: VllmConfig, root: nn.Module | None, prefix: str) -> None:
        model = vllm_config.model_config
        self.is_tracked = vllm_config.load_config.load_format not in UNTRACKED_LOADERS
        self.hidden_size, self.dtype = model.get_hidden_size(), model.dtype
        self._prefix = prefix
        self._root: weakref.ref[nn.Module] | None = None
        if root is not None and _is_last_rank():
            if hasattr(root, STREAM):
                raise UserError(f"{type(root).__name__} has an attribute {STREAM!r}; {REMEDY}")
            self._attach(root)

    def keeps_tensors(self) -> bool:
        """Whether this rank loads the tensors of the stream; call when all modules exist.

        UserError for a model in which the exit was not found.
        """
        if not _is_last_rank():
            return False
        root = self._root() if self._root is not None else None
        if root is None or not self._finds_exit(root):
            raise UserError(
                "the hidden states of this checkpoint are rotated, and where they leave this "
                f"model class was not found ({self._prefix}); serve it as a model of vLLM "
                f"(--model-impl vllm), or {REMEDY}"
            )
        return True

    @abstractmethod
    def _attach(self, root: nn.Module) -> None:
        """Add the basis to the root, and what uses it."""

    @abstractmethod
    def _finds_exit(self, root: nn.Module) -> bool:
        """Whether the root, with all of its modules, has what hidden states go to."""

    def _add_basis(self, root: nn.Module) -> OriginalBasis:
        basis = OriginalBasis(self.hidden_size, self.dtype, self.is_tracked)
        root.add_module(STREAM, basis)
        self._root = weakref.ref(root)
        return basis


class ToPooler(WayBack):
    """A hook of the root of a pooling model, which turns back what the root returns."""

    def _attach(self, root: nn.Module) -> None:
        if type(root).__call__ is not nn.Module.__call__:
            return  # it would be compiled without the hook, and is refused when loading begins
        self._add_basis(root)
        root.register_forward_hook(_turn_back)

    def _finds_exit(self, root: nn.Module) -> bool:
        return hasattr(root, _POOLER)


class ToHead(WayBack):
    """What turns all that a head which drafts takes from the model."""

    def _attach(self, root: nn.Module) -> None:
        draft_heads.serve(root, self._add_basis(root))

    def _finds_exit(self, root: nn.Module) -> bool:
        return True  # refused where it was attached


def _turn_back(root: nn.Module, _: object, hidden: object) -> Tensor:
    """Turn back what the root returns, as its forward hook."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"{type(root).__name__} returned {type(hidden).__name__}, not a tensor")
    turned: Tensor = root.get_submodule(STREAM)(hidden)
    return turned


def _is_last_rank() -> bool:
    return not model_parallel_is_initialized() or bool(get_pp_group().is_last_rank)
