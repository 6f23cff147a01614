"""The method of a mixture of experts in a set with `"quant_method": "qoq_linear"`.

Each expert has the tensors of `vllm_qoq.checkpoint.format.QoQSet`, as a linear layer has. Tokens
are brought into the order of experts on the device, so that one GEMM does all of them
(`vllm_qoq.ops.expert_ops`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter
from vllm.config import get_current_vllm_config

from vllm_qoq import ops
from vllm_qoq.checkpoint.format import QOQ_LINEAR, QoQSet
from vllm_qoq.errors import FormatError
from vllm_qoq.numerics import EXPERT_GROUP_SIZES, EXPERT_MULTIPLE, reference
from vllm_qoq.ops import expert_ops, linear_ops, w4a8_layout
from vllm_qoq.serving.methods.dummy_values import make_valid
from vllm_qoq.serving.vllm_versions import FusedMoEMethodBase, RoutedExperts

_PER_CHANNEL = ("channel_scale", "channel_zero")
_GROUPS = ("group_scale", "group_offset")


@dataclass(frozen=True)
class ExpertWeights:
    """What one GEMM over all experts reads, as `expert_ops.w4a8_gemm_experts` has it."""

    weight: torch.Tensor
    channel_scale: torch.Tensor
    channel_zero: torch.Tensor | None
    workspace: torch.Tensor | None
    residual: torch.Tensor | None = None

    def of(
        self, dtype: torch.dtype, use_residual: torch.Tensor | None
    ) -> tuple[torch.Tensor | torch.dtype | None, ...]:
        """List the last arguments of the op, for an output in `dtype`."""
        per_channel = (self.channel_scale, self.channel_zero, None)
        return (self.weight, *per_channel, dtype, self.workspace, self.residual, use_residual)


class QoQExpertsMethod(FusedMoEMethodBase):
    """Computes a mixture of experts with QoQ weights.

    prefix  the layer's name in vLLM, `model.layers.0.mlp.experts`

    Raises FormatError for experts that the kernels do not compute.
    """

    def __init__(self, layer: RoutedExperts, qoq_set: QoQSet, prefix: str) -> None:
        super().__init__(layer.moe_config)
        self.qoq_set, self.prefix = qoq_set, prefix
        for what in self._obstacles(layer):
            raise FormatError(
                f"{prefix}: a {QOQ_LINEAR} set does not serve {what}; quantize again with these "
                "experts in `ignore`, or serve another set with force_set"
            )

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create this rank's experts, and of each its slice; FormatError for a size it cannot have.

        w13 are gate and up, [2 intermediate, hidden], and w2 is down, [hidden, intermediate].
        """
        inner, group = intermediate_size_per_partition, self.qoq_set.group_size
        self._check_sizes(hidden_size, inner)
        self.experts = num_experts
        self.is_dummy = get_current_vllm_config().load_config.load_format == "dummy"
        for stem, n, k in (("w13", 2 * inner, hidden_size), ("w2", hidden_size, inner)):
            shapes = {"qweight": (torch.uint8, (n, k // 2)), "channel_scale": (torch.float32, (n,))}
            if group == -1:
                shapes["channel_zero"] = (torch.float32, (n,))
            else:
                shapes["group_scale"] = (torch.uint8, (n, k // group))
                shapes["group_offset"] = (torch.int8, (n, k // group))
            for leaf, (dtype, shape) in shapes.items():
                data = torch.empty(num_experts, *shape, dtype=dtype)
                parameter = Parameter(data, requires_grad=False)
                # vLLM's loader of experts slices scales by what it knows them for.
                kind = "channel" if leaf in _PER_CHANNEL else "group"
                for name, value in {**extra_weight_attrs, "quant_method": kind}.items():
                    setattr(parameter, name, value)
                layer.register_parameter(f"{stem}_{leaf}", parameter)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check the values and bring the weights into the order of the kernels, once."""
        device = layer.w13_qweight.device
        if not ops.has_kernels(device.type):
            raise RuntimeError(f"{self.prefix}: {QOQ_LINEAR} cannot run: {ops.missing_kernels()}")
        is_packed = device.type == "cuda"
        for stem in ("w13", "w2"):
            tensors = loaded(layer, stem)
            if self.is_dummy:
                make_valid(tensors)
            weights = []
            for expert in range(self.experts):
                mine = {leaf: tensor[expert] for leaf, tensor in tensors.items()}
                weight = self.checked_int8(stem, expert, mine)
                if is_packed:
                    groups = (mine.get(leaf) for leaf in _GROUPS)
                    weight = w4a8_layout.pack(mine["qweight"], *groups)
                weights.append(weight)
            for leaf in ("qweight", *_GROUPS):
                setattr(layer, f"{stem}_{leaf}", None)
            setattr(layer, f"{stem}_weight", Parameter(torch.cat(weights), requires_grad=False))
            for leaf in _PER_CHANNEL:
                flat = tensors[leaf].flatten() if leaf in tensors else None
                value = None if flat is None else Parameter(flat, requires_grad=False)
                setattr(layer, f"{stem}_{leaf}", value)
        # A buffer, as in a linear layer, since its counters have to be zero after a sleep, too.
        # It is the experts' own: shared experts, which are linear layers, run in another stream.
        workspace = linear_ops.workspace(device, "experts") if is_packed else None
        layer.register_buffer("workspace", workspace, persistent=False)
        if is_packed:
            # The kernel fetches weights before the kernel ahead of it has ended.
            torch.cuda.synchronize(device)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """Give none: vLLM's own kernels for experts are not used."""

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute the weighted sum of this rank's experts for each token, [tokens, hidden]."""
        return self.compute(layer, x, topk_weights, topk_ids)

    def compute(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        use_residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute `apply`; the ops follow each other as `expert_ops` says.

        use_residual  int32 [1] on the device, for a nested set on a GPU: 0 leaves its plane out
        """
        qoq, ids = torch.ops.qoq, topk_ids.to(torch.int32)
        tile = expert_ops.tile_for(ids.numel(), layer.global_num_experts)
        rows, tile_expert, tiles = qoq.route_to_experts(ids, layer.expert_map, self.experts, tile)
        inputs = qoq.quantize_for_experts(x, rows, tile, tile_expert)
        where = (tiles, tile_expert, self.experts)
        first, second = (self._weights(layer, stem) for stem in ("w13", "w2"))
        gate_up = qoq.w4a8_gemm_experts(*inputs, *where, *first.of(x.dtype, use_residual))
        inner = qoq.silu_and_mul_quantize_experts(gate_up, tiles, tile)
        y = qoq.w4a8_gemm_experts(*inner, *where, *second.of(x.dtype, use_residual))
        return qoq.combine_experts(y, rows, topk_weights.float())

    def _weights(self, layer: Any, stem: str) -> ExpertWeights:
        weight, scale, zero = (
            getattr(layer, f"{stem}_{leaf}") for leaf in ("weight", *_PER_CHANNEL)
        )
        return ExpertWeights(weight, scale, zero, layer.workspace)

    def _obstacles(self, layer: RoutedExperts) -> list[str]:
        activation = getattr(layer.activation, "value", layer.activation)
        found = []
        if self.qoq_set.group_size not in EXPERT_GROUP_SIZES:
            found.append(f"experts in groups of {self.qoq_set.group_size} (it does -1 and 128)")
        if activation != "silu" or not layer.moe_config.is_act_and_mul:
            found.append(f"experts with the activation {activation!r} (it does 'silu')")
        for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta"):
            if (value := getattr(layer, name, None)) is not None:
                found.append(f"experts whose activation has {name} {value}")
        if layer.moe_config.has_bias:
            found.append("experts with a bias")
        if layer.apply_router_weight_on_input:
            found.append("experts whose inputs the router weights")
        if layer.moe_config.num_experts > expert_ops.MOST_EXPERTS:
            found.append(f"more than {expert_ops.MOST_EXPERTS} experts")
        return found

    def _check_sizes(self, hidden_size: int, inner: int) -> None:
        ranks = self.moe.tp_size
        remedy = "quantize again with these experts in `ignore`"
        if ranks > 1 and not inner * ranks % EXPERT_MULTIPLE:
            remedy = "use --enable-expert-parallel or a smaller --tensor-parallel-size"
        for name, size, of in (
            ("hidden_size", hidden_size, ""),
            ("moe_intermediate_size", inner, f" on each of {ranks} ranks" if ranks > 1 else ""),
        ):
            if size % EXPERT_MULTIPLE:
                raise FormatError(
                    f"{self.prefix}: {name} is {size}{of}, but {QOQ_LINEAR} experts need a "
                    f"multiple of {EXPERT_MULTIPLE}; {remedy}, or serve another set with force_set"
                )

    def checked_int8(
        self, stem: str, expert: int, tensors: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Compute the int8 weights of one expert; FormatError for values that no checkpoint has."""
        try:
            return reference.int8_weight(tensors)
        except ValueError as error:
            raise FormatError(
                f"{self.prefix}: expert {expert} of this rank, {stem}_{error}; run `vllm-qoq "
                "verify` on the checkpoint, download or quantize it again"
            ) from None


def loaded(layer: Any, stem: str) -> dict[str, torch.Tensor]:
    """Take the tensors of all experts as loaded, by leaf; `stem` is w13 or w2."""
    leaves = ("qweight", *_PER_CHANNEL, *_GROUPS)
    found = {leaf: getattr(layer, f"{stem}_{leaf}", None) for leaf in leaves}
    return {leaf: tensor.data for leaf, tensor in found.items() if tensor is not None}
