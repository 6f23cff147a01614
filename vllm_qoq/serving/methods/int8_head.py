"""The lm_head in int8, which all sets of a checkpoint share: half the bytes of the bf16 one.

It is computed as W8A8 by the scheme that vLLM has for linear layers; the vocabulary may be split.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW8A8Int8,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_qoq.checkpoint.format import INT8_HEAD_TENSORS
from vllm_qoq.errors import FormatError
from vllm_qoq.serving.methods.weight_set import UNTRACKED_LOADERS, held_by_kernel


class Int8HeadMethod(LinearMethodBase):
    """Computes logits with the tensors `lm_head.weight` and `lm_head.weight_scale`."""

    def __init__(self, prefix: str, load_format: str) -> None:
        self.prefix = prefix
        self.is_tracked = load_format not in UNTRACKED_LOADERS
        self.scheme = CompressedTensorsW8A8Int8(
            strategy="channel", is_static_input_scheme=False, input_symmetric=True
        )
        self._loaded: set[int] = set()

    def create_weights(
        self,
        layer: ParallelLMHead,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create this rank's rows of both tensors."""
        load = extra_weight_attrs["weight_loader"]
        self.params_dtype = params_dtype

        # vLLM's loading anew exchanges the argument that is named `param`.
        def load_and_record(param: torch.nn.Parameter, tensor: torch.Tensor) -> None:
            load(param, tensor)
            self._loaded.add(id(param))

        self.scheme.create_weights(
            layer,
            output_partition_sizes=output_partition_sizes,
            input_size_per_partition=input_size_per_partition,
            params_dtype=params_dtype,
            weight_loader=load_and_record,
        )

    def process_weights_after_loading(self, layer: ParallelLMHead) -> None:
        """Check that both tensors arrived, then let vLLM's kernel prepare them."""
        for name in INT8_HEAD_TENSORS if self.is_tracked else ():
            if id(getattr(layer, name)) not in self._loaded:
                raise FormatError(
                    f"the checkpoint did not fill {self.prefix}.{name}, which its "
                    "quantization_config.lm_head announces; run `vllm-qoq verify` on the checkpoint"
                )
        # vLLM pads the vocabulary with rows of zeros, whose scales are not looked at.
        scale = layer.weight_scale.data[: layer.shard_indices.num_org_elements]
        if self.is_tracked and not (scale.isfinite() & (scale > 0)).all():
            raise FormatError(
                f"{self.prefix}.weight_scale holds a scale that is not finite and positive; run "
                "`vllm-qoq verify` on the checkpoint, download or quantize it again"
            )
        self._loaded.clear()
        # vLLM's kernel for the CPU writes its outputs in the default dtype, which is another one
        # when weights are loaded anew.
        with set_default_torch_dtype(self.params_dtype):
            self.scheme.process_weights_after_loading(layer)
        self._held = held_by_kernel(layer)

    def apply(
        self, layer: ParallelLMHead, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute logits [num_tokens, this rank's vocabulary] of x [num_tokens, K], like x."""
        logits: torch.Tensor = self.scheme.apply_weights(layer, x, bias)
        return logits
