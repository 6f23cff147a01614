"""The method of a set with `"quant_method": "qoq_residual"`: int8 weights from two 4-bit planes.

The first plane is the base's, a `qoq_linear` set of the same layer; this set adds `qresidual`. On a
GPU the weights stay two planes, which one GEMM reads, so that both sets take as much memory as the
8-bit one. On a CPU int8 weights of its own are made once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    LinearBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.parameter import PackedvLLMParameter

from vllm_qoq.checkpoint.format import QOQ_RESIDUAL, ResidualSet
from vllm_qoq.errors import FormatError
from vllm_qoq.numerics import reference
from vllm_qoq.numerics.packing import unpack_nibbles
from vllm_qoq.ops import w4a8_layout
from vllm_qoq.serving.methods.dummy_values import make_valid
from vllm_qoq.serving.methods.input_slice import InputSlice
from vllm_qoq.serving.methods.qoq_experts import QoQExpertsMethod
from vllm_qoq.serving.methods.qoq_linear import (
    QoQLinearConfig,
    QoQLinearMethod,
    QoQSetConfig,
    QuantizedTokens,
    checked_int8,
    loaded,
)
from vllm_qoq.serving.methods.qoq_residual_experts import QoQResidualExpertsMethod
from vllm_qoq.serving.vllm_versions import RoutedExperts

if TYPE_CHECKING:
    from vllm_qoq.serving.methods.weight_set import WeightSet

_NO_RESIDUALS = reference.RESIDUAL_ZERO | reference.RESIDUAL_ZERO << 4  # two in a byte


class QoQResidualConfig(QoQSetConfig):
    """The config of one qoq_residual set; `attach` gives it its base before vLLM asks it."""

    def __init__(self, residual_set: ResidualSet) -> None:
        super().__init__()
        self.residual_set = residual_set
        self.base: QoQLinearConfig | None = None

    def attach(self, base: QuantizationConfig) -> None:
        """Take the config of the set that `residual_set` names, which says what is quantized."""
        assert isinstance(base, QoQLinearConfig)
        self.base = base

    @classmethod
    def get_name(cls) -> str:
        """Name the `quant_method` of the set."""
        return QOQ_RESIDUAL

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QoQResidualConfig:
        """Read one entry of `sets`; FormatError says what is wrong."""
        return cls(ResidualSet.parse(config, QOQ_RESIDUAL))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Choose the method of layers that the base quantizes; the base answers for all others."""
        assert self.base is not None
        self.base.packed_modules_mapping = self.packed_modules_mapping
        method = self.base.get_quant_method(layer, prefix)
        if isinstance(method, QoQExpertsMethod):
            assert isinstance(layer, RoutedExperts)
            return QoQResidualExpertsMethod(layer, method.qoq_set, method.prefix)
        if not isinstance(method, QoQLinearMethod):
            return method
        return QoQResidualMethod(method.qoq_set, method.prefix, method.parts)


@register_weight_loader_v2_supported_method
class QoQResidualMethod(QoQLinearMethod):
    """Computes one linear layer in int8, with the weights of `base` and `qresidual`."""

    base: WeightSet  # the weights of the base set in the same layer
    # Whether this set was loaded anew and its base still has to be.
    is_waiting = False

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create this rank's slice of qresidual; the base's method has checked the sizes."""
        k = input_size_per_partition
        group_size = self.qoq_set.group_size
        self.inputs = InputSlice(layer.tp_rank * k if k < input_size else 0, k, group_size)
        self.output_partition_sizes = output_partition_sizes
        layer.qresidual = PackedvLLMParameter(
            data=torch.empty(sum(output_partition_sizes), k // 2, dtype=torch.uint8),
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            packed_factor=2,
            weight_loader=extra_weight_attrs["weight_loader"],
        )

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check the values, with the base's as they were loaded, and bring them into the last form.

        Call it before the base's weights are packed.
        """
        stored: Any = self.base
        if getattr(stored, "qweight", None) is None or stored.qweight.is_meta:
            self._process_alone(layer)
            return
        device = layer.qresidual.device
        if self.base_method.is_dummy:
            make_valid(loaded(stored, slice(None)))
            layer.qresidual.data.random_(0, 256)
        n, half_k = layer.qresidual.shape
        is_packed = device.type == "cuda"
        weight = torch.empty(0 if is_packed else n, 2 * half_k, dtype=torch.int8, device=device)
        residual = self._whole_blocks(layer)
        for part, rows in self._rows():
            checked = checked_int8(part, stored, rows, self.inputs, qresidual=residual[rows])
            if not is_packed:
                weight[rows] = checked
        if is_packed:
            weight = w4a8_layout.pack(residual)
            # The kernel fetches weights before the kernel ahead of it has ended.
            torch.cuda.synchronize(device)
        layer.weight = Parameter(weight, requires_grad=False)
        del layer.qresidual

    def complete(self, layer: LinearBase) -> None:
        """Check the weights with the base's, and add those where int8 weights are made."""
        base: Any = self.base
        residual = layer.weight.data
        is_packed = residual.dtype == torch.uint8
        if is_packed:
            n = base.channel_scale.shape[0]
            level1 = reference.int8_weight(_stored(base.weight.data, n))
            residual = unpack_nibbles(w4a8_layout.unpack(residual, n)[0]).to(torch.int16)
            residual -= reference.RESIDUAL_ZERO
        else:
            level1 = base.weight.data
        weight = level1.to(torch.int16) + residual
        if int(weight.min()) < -128 or int(weight.max()) > 127:
            raise FormatError(
                f"{self.prefix}: qresidual with the base's weights leaves the range of int8; run "
                "`vllm-qoq verify` on the checkpoint, download or quantize it again"
            )
        if not is_packed:
            layer.weight.data.copy_(weight)
        self.is_waiting = False

    def _process_alone(self, layer: LinearBase) -> None:
        """Process what was loaded anew: the base's weights are in their last form, or to come."""
        if layer.qresidual.device.type == "cuda":
            weight = w4a8_layout.pack(self._whole_blocks(layer))
        else:
            weight = unpack_nibbles(layer.qresidual).to(torch.int8) - reference.RESIDUAL_ZERO
        layer.weight = Parameter(weight, requires_grad=False)
        del layer.qresidual
        if hasattr(self.base, "weight"):
            self.complete(layer)
        else:
            self.is_waiting = True

    def apply(
        self,
        layer: LinearBase,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        use_residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute y = x @ W.T + bias, x [..., K] in the model's dtype.

        use_residual  int32 [1] on the device, where there are two planes: 0 leaves the second out
        """
        quantized = torch.ops.qoq.quantize_per_token(x.reshape(-1, x.shape[-1]))
        y = self.apply_int8(layer, quantized, bias, x.dtype, use_residual)
        return y.view(*x.shape[:-1], y.shape[-1])

    def apply_int8(
        self,
        layer: LinearBase,
        quantized: QuantizedTokens,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
        use_residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute y [M, N] in `out_dtype` from inputs that are quantized already."""
        if self.is_waiting:  # the base was not loaded anew
            self.complete(layer)
        base: Any = self.base
        is_packed = layer.weight.dtype == torch.uint8
        codes, *of_tokens = quantized
        if is_packed:
            codes = self.inputs.whole_blocks_of_tokens(codes)
        return torch.ops.qoq.w4a8_gemm(
            codes,
            *of_tokens,
            base.weight if is_packed else layer.weight,
            base.channel_scale,
            None,  # channel_zero
            None,  # group_scale
            None,  # group_offset
            bias,
            out_dtype,
            base.workspace,
            layer.weight if is_packed else None,
            use_residual,
        )

    def _whole_blocks(self, layer: LinearBase) -> torch.Tensor:
        """The layer's residuals, uint8, padded to whole blocks with such as add nothing."""
        return self.inputs.whole_blocks(layer.qresidual.data, _NO_RESIDUALS)

    @property
    def base_method(self) -> QoQLinearMethod:
        """The method that computes with `base`."""
        method = self.base.linear_method
        assert isinstance(method, QoQLinearMethod)
        return method


def _stored(packed: torch.Tensor, n: int) -> dict[str, torch.Tensor]:
    """Unpack a packed weight with groups to the tensors that a checkpoint stores."""
    qweight, scale, offset = w4a8_layout.unpack(packed, n)
    assert scale is not None and offset is not None
    return {"qweight": qweight, "group_scale": scale, "group_offset": offset}
