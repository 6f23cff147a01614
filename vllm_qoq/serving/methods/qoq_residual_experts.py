"""The method of a mixture of experts in a set with `"quant_method": "qoq_residual"`.

As in a linear layer (`qoq_residual`), the base's weights are the first plane and this set adds
`qresidual`: on a GPU both planes are read by one GEMM, on a CPU int8 weights are made once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from vllm_qoq.ops import w4a8_layout
from vllm_qoq.serving.methods.dummy_values import make_valid
from vllm_qoq.serving.methods.qoq_experts import (
    ExpertWeights,
    QoQExpertsMethod,
    loaded,
)
from vllm_qoq.serving.vllm_versions import RoutedExperts


class QoQResidualExpertsMethod(QoQExpertsMethod):
    """Computes a mixture of experts in int8, with the weights of `base` and `qresidual`."""

    base: Any  # the experts of the base set in the same layer, an `ExpertSet`

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create this rank's slices of qresidual; the base's method checks the sizes."""
        inner, self.experts = intermediate_size_per_partition, num_experts
        for stem, n, k in (("w13", 2 * inner, hidden_size), ("w2", hidden_size, inner)):
            data = torch.empty(num_experts, n, k // 2, dtype=torch.uint8)
            parameter = Parameter(data, requires_grad=False)
            # vLLM's loader goes by names and slices this one as the codes of the base.
            for name, value in {**extra_weight_attrs, "loaded_as": f"{stem}_qweight"}.items():
                setattr(parameter, name, value)
            layer.register_parameter(f"{stem}_qresidual", parameter)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check the values with the base's as they were loaded, and bring them into the last form.

        Call it before the base's weights are in theirs.
        """
        is_packed = layer.w13_qresidual.device.type == "cuda"
        for stem in ("w13", "w2"):
            residual, tensors = getattr(layer, f"{stem}_qresidual").data, loaded(self.base, stem)
            if self.base.method.is_dummy:
                make_valid(tensors)
                residual.random_(0, 256)
            weights = []
            for expert in range(self.experts):
                mine = {leaf: tensor[expert] for leaf, tensor in tensors.items()}
                weight = self.checked_int8(stem, expert, mine | {"qresidual": residual[expert]})
                weights.append(w4a8_layout.pack(residual[expert]) if is_packed else weight)
            setattr(layer, f"{stem}_qresidual", None)
            setattr(layer, f"{stem}_weight", Parameter(torch.cat(weights), requires_grad=False))
        if is_packed:
            # The kernel fetches weights before the kernel ahead of it has ended.
            torch.cuda.synchronize(layer.w13_weight.device)

    def _weights(self, layer: Any, stem: str) -> ExpertWeights:
        base = super()._weights(self.base, stem)
        own = getattr(layer, f"{stem}_weight")
        if own.dtype == torch.int8:  # with the base's in it
            return ExpertWeights(own, base.channel_scale, None, None)
        return ExpertWeights(base.weight, base.channel_scale, None, base.workspace, own)
