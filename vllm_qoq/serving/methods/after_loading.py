"""A quantization method that vLLM calls once weights are loaded, and that computes nothing."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase


class AfterLoading(QuantizeMethodBase):
    """The `quant_method` of a module that is no layer of vLLM's, for what follows its loading.

    A subclass says in `process_weights_after_loading` what is done then.
    """

    def create_weights(
        self, layer: nn.Module, *weight_args: Any, **extra_weight_attrs: Any
    ) -> None:
        """Create nothing, because the module made its parameters itself."""

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Raise NotImplementedError, because nothing computes with this method."""
        raise NotImplementedError

    @abstractmethod
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Do what follows the loading of the weights of `layer`."""
