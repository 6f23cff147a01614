"""The method of a set with `"quant_method": "qoq_linear"`: 4-bit weights, int8 activations.

The tensors are those of `vllm_qoq.checkpoint.format.QoQSet`. Nothing in them is permuted, so
vLLM's own parameter classes slice them for tensor parallelism, but for groups that two ranks
share (`input_slice`); where a row-parallel layer is per channel, every rank has the whole
channel_scale and channel_zero and its own row sum, and the products add up over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    PackedvLLMParameter,
)

from vllm_qoq import ops
from vllm_qoq.cards import OLDEST
from vllm_qoq.checkpoint.format import QOQ_LINEAR, QoQSet
from vllm_qoq.errors import FormatError
from vllm_qoq.models.names import shards_of_parts
from vllm_qoq.numerics import reference
from vllm_qoq.ops import linear_ops, w4a8_layout
from vllm_qoq.serving.methods.dummy_values import make_valid
from vllm_qoq.serving.methods.input_slice import GroupsOfSlice, InputSlice
from vllm_qoq.serving.methods.qoq_experts import QoQExpertsMethod
from vllm_qoq.serving.vllm_versions import RoutedExperts

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

    from vllm_qoq.serving.methods.weight_set import WeightSet

# Codes int8 [M, K], scale float32 [M] and row sum int32 [M] of `qoq::quantize_per_token`.
QuantizedTokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_TENSORS = ("qweight", "channel_scale", "channel_zero", "group_scale", "group_offset")


class QoQSetConfig(QuantizationConfig):
    """The answers to vLLM that are common to the configs of sets which our kernels compute."""

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """List the dtypes that the ops can write."""
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ask for the oldest GPU that the kernels are for."""
        return 10 * OLDEST[0] + OLDEST[1]

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Name no more files to read, because everything is in config.json."""
        return []


class QoQLinearConfig(QoQSetConfig):
    """The config of one qoq_linear set."""

    def __init__(self, qoq_set: QoQSet) -> None:
        super().__init__()
        self.qoq_set = qoq_set

    @classmethod
    def get_name(cls) -> str:
        """Name the `quant_method` of the set."""
        return QOQ_LINEAR

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QoQLinearConfig:
        """Read one entry of `sets`; FormatError says what is wrong."""
        return cls(QoQSet.parse(config, QOQ_LINEAR))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Follow a model whose layers have other names in vLLM than in the checkpoint."""
        ignore = tuple(hf_to_vllm_mapper.apply_list(list(self.qoq_set.ignore)))
        self.qoq_set = self.qoq_set.model_copy(update={"ignore": ignore})

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Choose the method of a linear layer or of experts; None for all else, not quantized."""
        if isinstance(layer, RoutedExperts):
            is_ignored = self.qoq_set.ignores(f"{prefix}.0.{layer.ckpt_down_proj_name}")
            return None if is_ignored else QoQExpertsMethod(layer, self.qoq_set, prefix)
        if not isinstance(layer, LinearBase):
            return None
        parts = fused_parts(prefix, self.packed_modules_mapping)
        ignored = [part for part in parts if self.qoq_set.ignores(part)]
        if not ignored:
            return QoQLinearMethod(self.qoq_set, prefix, parts)
        if len(ignored) < len(parts):
            raise FormatError(
                f"the ignore list of a {QOQ_LINEAR} set has {ignored[0]} but not all of "
                f"{', '.join(parts)}, which vLLM computes as one layer; quantize all or none"
            )
        return UnquantizedLinearMethod()


def fused_parts(prefix: str, packed_modules_mapping: Mapping[str, list[str]]) -> list[str]:
    """List the checkpoint layers that vLLM fuses into `prefix`."""
    parent, dot, leaf = prefix.rpartition(".")
    return [f"{parent}{dot}{part}" for part in packed_modules_mapping.get(leaf, [leaf])]


@register_weight_loader_v2_supported_method
class QoQLinearMethod(LinearMethodBase):
    """Computes one linear layer with QoQ weights.

    prefix  the layer's name in vLLM
    parts   the checkpoint layers fused in it
    """

    checked_tensors = frozenset(_TENSORS)

    def __init__(self, qoq_set: QoQSet, prefix: str, parts: list[str]) -> None:
        self.qoq_set, self.prefix, self.parts = qoq_set, prefix, parts
        self.residual: WeightSet | None = None  # the layer's nested set, if this is its base

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
        """Create this rank's slice of every tensor; FormatError for a size that cannot be."""
        n, k, group = sum(output_partition_sizes), input_size_per_partition, self.qoq_set.group_size
        self._check_size(k, input_size)
        self.inputs = InputSlice(
            layer.tp_rank * k if k < input_size else 0, k, None if group == -1 else group
        )
        self.output_partition_sizes = output_partition_sizes
        load = {"weight_loader": extra_weight_attrs["weight_loader"]}
        self.is_dummy = get_current_vllm_config().load_config.load_format == "dummy"
        both: dict[str, Any] = {"input_dim": 1, "output_dim": 0, **load}
        for name in _TENSORS:
            layer.register_parameter(name, None)
        layer.qweight = PackedvLLMParameter(
            data=torch.empty(n, k // 2, dtype=torch.uint8), packed_dim=1, packed_factor=2, **both
        )
        layer.channel_scale = _per_channel(n, load)
        if group == -1:
            layer.channel_zero = _per_channel(n, load)
            return
        shape, both = (n, self.inputs.groups), both | {"inputs": self.inputs}
        layer.group_scale = GroupsOfSlice(
            data=torch.empty(shape, dtype=torch.uint8), input_size=input_size, **both
        )
        layer.group_offset = GroupsOfSlice(
            data=torch.empty(shape, dtype=torch.int8), input_size=input_size, **both
        )

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check the values and bring the weight into the order of the kernels, once."""
        device = layer.qweight.device
        if not ops.has_kernels(device.type):
            raise RuntimeError(
                f"{self.prefix}: {QOQ_LINEAR} cannot run here: {ops.missing_kernels()}; or use "
                "another set of the checkpoint, for example with "
                """--additional-config '{"qoq": {"force_set": "w8a8"}}', or serve on the CPU"""
            )
        if self.is_dummy:
            make_valid(loaded(layer, slice(None)))
        n, half_k = layer.qweight.shape
        is_packed = device.type == "cuda"
        if is_packed:
            self._check_size_of_kernel(n)
        weight = torch.empty(0 if is_packed else n, 2 * half_k, dtype=torch.int8, device=device)
        for part, rows in self._rows():
            checked = checked_int8(part, layer, rows, self.inputs)
            if not is_packed:
                weight[rows] = checked
        # The workspace is a buffer, because its counters have to be zero: sleeping at level 2, vLLM
        # drops what was allocated while the model was loaded, and brings back only buffers.
        layer.register_buffer(
            "workspace", linear_ops.workspace(device) if is_packed else None, persistent=False
        )
        if is_packed:
            weight = self._packed(layer)
            # The kernel fetches weights before the kernel ahead of it has ended.
            torch.cuda.synchronize(device)
        layer.weight = Parameter(weight, requires_grad=False)
        del layer.qweight
        layer.group_scale = layer.group_offset = None
        if self.residual is not None and self.residual.linear_method.is_waiting:
            self.residual.linear_method.complete(self.residual)

    def apply(
        self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute y = x @ W.T + bias, x [..., K] in the model's dtype."""
        quantized = torch.ops.qoq.quantize_per_token(x.reshape(-1, x.shape[-1]))
        y = self.apply_int8(layer, quantized, bias, x.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    def apply_int8(
        self,
        layer: LinearBase,
        quantized: QuantizedTokens,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Compute y [M, N] in `out_dtype` from inputs that are quantized already."""
        codes, *of_tokens = quantized
        if layer.weight.dtype == torch.uint8:  # packed
            codes = self.inputs.whole_blocks_of_tokens(codes)
        return torch.ops.qoq.w4a8_gemm(
            codes,
            *of_tokens,
            layer.weight,
            layer.channel_scale,
            layer.channel_zero,
            layer.group_scale,
            layer.group_offset,
            bias,
            out_dtype,
            layer.workspace,
        )

    def _packed(self, layer: LinearBase) -> torch.Tensor:
        """Bring a layer as loaded into the order of the kernels."""
        tensors = _whole_blocks(loaded(layer, slice(None)), self.inputs)
        groups = tensors.get("group_scale"), tensors.get("group_offset")
        return w4a8_layout.pack(tensors["qweight"], *groups)

    def _check_size(self, k: int, input_size: int) -> None:
        if k % 2 == 0:
            return
        # The layer that owns this one adds the remedy for a split.
        remedy = "; quantize again with this layer in `ignore`" if k == input_size else ""
        raise FormatError(f"{k} inputs are odd, but a byte of {QOQ_LINEAR} has two codes{remedy}")

    def _check_size_of_kernel(self, n: int) -> None:
        if n % 8:
            raise FormatError(
                f"{self.prefix}: the CUDA kernel for {QOQ_LINEAR} needs a multiple of 8 outputs, "
                f"this rank has {n}; use fewer ranks, or quantize again with this layer in `ignore`"
            )

    def _rows(self) -> Iterator[tuple[str, slice]]:
        """List the checkpoint layers and their rows in the fused weight."""
        start = 0
        for part, sizes in shards_of_parts(self.parts, self.output_partition_sizes):
            yield part, slice(start, start + sum(sizes))
            start += sum(sizes)


def _per_channel(size: int, load: dict[str, Any]) -> ChannelQuantScaleParameter:
    data = torch.empty(size, dtype=torch.float32)
    return ChannelQuantScaleParameter(data=data, output_dim=0, **load)


def checked_int8(
    part: str, layer: LinearBase, rows: slice, inputs: InputSlice, **more: torch.Tensor
) -> torch.Tensor:
    """Compute `reference.int8_weight` of rows of a layer as loaded; FormatError names `part`.

    Codes among `more` are of whole blocks.
    """
    tensors = more | loaded(layer, rows)
    try:
        _check_floats(tensors)
        return reference.int8_weight(_whole_blocks(tensors, inputs))[:, inputs.columns]
    except ValueError as error:
        raise FormatError(
            f"{part}.{error}; run `vllm-qoq verify` on the checkpoint, download or quantize it "
            "again"
        ) from None


def loaded(layer: LinearBase, rows: slice) -> dict[str, torch.Tensor]:
    """Take rows of the tensors that a layer has as loaded, by leaf."""
    return {
        name: parameter.data[rows]
        for name in _TENSORS
        if (parameter := getattr(layer, name)) is not None
    }


def _whole_blocks(tensors: dict[str, torch.Tensor], inputs: InputSlice) -> dict[str, torch.Tensor]:
    """Pad the tensors of a layer to whole blocks, with weights of 0 in groups of their own."""
    padded = tensors | {"qweight": inputs.whole_blocks(tensors["qweight"])}
    for name, filler in (("group_scale", 1), ("group_offset", 0)):
        if name in tensors:
            padded[name] = inputs.groups_of_blocks(tensors[name], filler)
    return padded


def _check_floats(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError, beginning with the tensor's name, unless scales and zeros are sound."""
    scale, zero = tensors["channel_scale"], tensors.get("channel_zero")
    if not (scale.isfinite() & (scale > 0)).all():
        raise ValueError("channel_scale: holds a scale that is not finite and positive")
    if zero is not None and not zero.isfinite().all():
        raise ValueError("channel_zero: holds NaN or infinity")
