"""The module that turns hidden states of a rotated model into the original model's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from vllm.model_executor.utils import set_weight_attrs

from vllm_qoq.checkpoint.format import STREAM, stream_shapes
from vllm_qoq.errors import FormatError
from vllm_qoq.numerics import rotation as basis
from vllm_qoq.serving.methods.after_loading import AfterLoading


class OriginalBasis(nn.Module):
    """A module that turns last hidden states of a rotated model into the original model's.

    rotation  int8 [H, H]  as in the checkpoint
    norm      [H]          in the model's dtype

    is_tracked  whether they are loaded from a checkpoint in a way that is seen here
    """

    turn: torch.Tensor  # `vllm_qoq.numerics.rotation.matrix`, in the model's dtype
    of_last: torch.Tensor  # float32 [H], the factors of `last_hidden_state`
    of_head: torch.Tensor  # float32 [H], those of `head_input`

    def __init__(self, hidden_size: int, dtype: torch.dtype, is_tracked: bool) -> None:
        super().__init__()
        shapes = stream_shapes(hidden_size)
        self.rotation = self._parameter(torch.zeros(shapes["rotation"], dtype=torch.int8))
        self.norm = self._parameter(torch.ones(shapes["norm"], dtype=dtype))
        self.quant_method = _Finish(is_tracked)
        self.is_tracked = is_tracked
        self.loaded: set[str] = set()
        self._kept: dict[str, torch.Tensor] = {}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Turn what leaves the final norm, [num_tokens, H]; the dtype stays."""
        return basis.last_hidden_state(hidden, self.turn, self.of_last)

    def stream(self, stream: torch.Tensor) -> torch.Tensor:
        """Turn embeddings and what is between layers, [..., n * H]; the dtype stays."""
        return basis.original_stream(stream, self.turn)

    def head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """Turn what the original lm_head reads, [..., H], into what this model's reads."""
        return basis.head_input(hidden, self.turn, self.of_head)

    def finish(self, is_tracked: bool) -> None:
        """Check what was loaded; FormatError names the tensor."""
        for leaf in ("rotation", "norm") if is_tracked else ():
            if leaf not in self.loaded:
                raise FormatError(
                    f"the checkpoint did not fill {STREAM}.{leaf}, which its "
                    f"quantization_config.{STREAM} announces; run `vllm-qoq verify` on the "
                    "checkpoint"
                )
        if is_tracked and (message := basis.finding(self.rotation)):
            raise FormatError(f"{STREAM}.rotation: {message}; download the checkpoint again")
        scale, norm = basis.scale(len(self.rotation)), self.norm.float()
        self._keep("turn", basis.matrix(self.rotation, self.norm.dtype))
        self._keep("of_last", norm * scale)
        self._keep("of_head", scale / norm)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load tensors, which vLLM names below this module; returns the names of the parameters.

        vLLM's Mistral models make `model.norm` of every `norm`.
        """
        loaded = set()
        for name, tensor in weights:
            leaf = name.removeprefix("model.")
            if leaf not in ("rotation", "norm"):
                raise FormatError(f"{STREAM}.{name}: is not known; download the checkpoint again")
            parameter: Any = self.get_parameter(leaf)
            parameter.weight_loader(parameter, tensor)
            loaded.add(leaf)
        return loaded

    def _keep(self, name: str, content: torch.Tensor) -> None:
        """Make a buffer, one tensor for good: when weights are loaded anew, graphs hold the old."""
        kept = self._kept.setdefault(name, content)
        if kept is not content:
            kept.copy_(content)
        self.register_buffer(name, kept, persistent=False)

    def _parameter(self, content: torch.Tensor) -> Parameter:
        parameter = Parameter(content, requires_grad=False)
        set_weight_attrs(parameter, {"weight_loader": self._load})
        return parameter

    # vLLM's loading anew exchanges the argument that is named `param`.
    def _load(self, param: Parameter, tensor: torch.Tensor) -> None:
        leaf = "rotation" if param.dtype == torch.int8 else "norm"
        is_int8 = tensor.dtype == torch.int8
        if tensor.shape != param.shape or is_int8 != (leaf == "rotation"):
            raise FormatError(
                f"{STREAM}.{leaf}: is {tensor.dtype} {list(tensor.shape)}, the model needs "
                f"{param.dtype} {list(param.shape)}"
            )
        param.data.copy_(tensor)
        self.loaded.add(leaf)


class _Finish(AfterLoading):
    """Makes vLLM's loader say when everything is loaded."""

    def __init__(self, is_tracked: bool) -> None:
        self.is_tracked = is_tracked

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Let `OriginalBasis` check and prepare its tensors."""
        assert isinstance(layer, OriginalBasis)
        layer.finish(self.is_tracked)
