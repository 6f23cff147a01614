"""A linear layer that holds one child module per set and computes with the one of the step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import ForwardContext
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)

from vllm_qoq.checkpoint.format import INPUT_RATIO
from vllm_qoq.errors import FormatError
from vllm_qoq.routing.table import LayerRoute
from vllm_qoq.serving.methods import flex_op  # noqa: F401  (defines torch.ops.qoq.flex_linear)
from vllm_qoq.serving.methods.qoq_linear import QoQLinearMethod, QuantizedTokens
from vllm_qoq.serving.methods.qoq_residual import QoQResidualMethod
from vllm_qoq.serving.methods.weight_set import UNTRACKED_LOADERS, WeightSet
from vllm_qoq.serving.routing.choose import choose
from vllm_qoq.serving.routing.policy import Policy
from vllm_qoq.serving.routing.step import current_step
from vllm_qoq.serving.vllm_versions import encode_layer_name


@dataclass(frozen=True)
class SetMethod:
    """The method by which one set computes a layer, and the state that it left on the layer."""

    method: LinearMethodBase
    state: dict[str, Any]
    has_input_ratio: bool
    base: str | None = None  # the set to whose weights this one adds a residual


@register_weight_loader_v2_supported_method
class FlexLinearMethod(LinearMethodBase):
    """Routes one linear layer among the sets that its route can reach.

    prefix  the layer's name in vLLM, `model.layers.0.self_attn.qkv_proj`
    parts   the checkpoint layers fused in it, `...q_proj`, `...k_proj`, `...v_proj`
    """

    def __init__(
        self,
        prefix: str,
        parts: list[str],
        sets: dict[str, SetMethod],
        route: LayerRoute,
        policy: Policy,
    ) -> None:
        self.prefix, self.parts, self.sets = prefix, parts, sets
        self.route, self.policy = route, policy
        self.key = f"{prefix}.qoq"
        # If all sets read int8, one quantization serves them, outside of the opaque op.
        self._reads_int8 = all(
            isinstance(choice.method, QoQLinearMethod) and not choice.has_input_ratio
            for choice in sets.values()
        )
        self._weights: dict[str, WeightSet] = {}

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
        """Add one `WeightSet` per set and make the layer known to the op."""
        vllm_config = get_current_vllm_config()
        self.in_features = input_size_per_partition
        self.out_features = sum(output_partition_sizes)
        self.is_tracked = vllm_config.load_config.load_format not in UNTRACKED_LOADERS
        self._takes_adapters = vllm_config.lora_config is not None
        for name, choice in self.sets.items():
            if hasattr(layer, name):
                raise FormatError(f"{self.prefix} has an attribute {name!r}; rename the set")
            weights = WeightSet(
                layer, name, choice.method, choice.state, self.parts, self.is_tracked
            )
            with self._named(name, input_size, input_size_per_partition):
                weights.create(
                    layer,
                    input_size_per_partition,
                    list(output_partition_sizes),
                    params_dtype,
                    has_input_ratio=choice.has_input_ratio,
                    input_size=input_size,
                    output_size=output_size,
                )
            layer.add_module(name, weights)
            self._weights[name] = weights
        for name, choice in self.sets.items():
            if choice.base is not None:
                assert isinstance(choice.method, QoQResidualMethod)
                choice.method.base = self._weights[choice.base]
                choice.method.base_method.residual = self._weights[name]
        layers = vllm_config.compilation_config.static_forward_context
        if self.key in layers:
            raise ValueError(f"two layers are named {self.prefix!r}")
        layers[self.key] = layer

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check that every tensor arrived, then let each set prepare its weights."""
        self.policy.check_rules()
        for weights in self._weights.values():
            if self.is_tracked:
                weights.check_loaded(self.prefix, self.parts)
                weights.check_values(self.prefix)
            if layer.bias is not None and layer.skip_bias_add:
                # vLLM adds the layer's own bias outside; it has to be every set's.
                self._share_bias(layer, weights)
        # A residual is checked with its base's weights as they were loaded.
        for name in sorted(self.sets, key=lambda name: self.sets[name].base is None):
            self._weights[name].finish()
        self._check_pairs()
        for weights in self._weights.values():
            self._warm_up(weights)
        with_ratio = (w.set_name for w in self._weights.values() if w.input_ratio is not None)
        self._index_of_scaled = {name: index for index, name in enumerate(with_ratio)}
        if self._takes_adapters:
            # vLLM asks a layer's weight for the device of its adapters, and the sets have them all
            # here. It is no parameter, which loaders would look for.
            device = next(layer.parameters()).device
            vars(layer)["weight"] = torch.empty(0, dtype=layer.params_dtype, device=device)

    def apply(
        self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the inputs of the sets, and call the opaque op; torch.compile traces this.

        `bias` only says whether this rank adds one; each set has its own. The products with
        an input_ratio are out here, where Inductor writes them in the kernel of the norm
        before the layer; inside the op each would be a kernel of its own.
        """
        key = encode_layer_name(self.key)
        if self._reads_int8:
            rows = x if x.ndim == 2 else x.flatten(0, -2)
            quantized = torch.ops.qoq.quantize_per_token(rows)
            y = torch.ops.qoq.flex_linear_int8(
                *quantized, x.dtype, bias is not None, self.out_features, key
            )
            return y if x.ndim == 2 else y.unflatten(0, x.shape[:-1])
        scaled = [
            (x * weights.input_ratio).to(x.dtype)
            for weights in (getattr(layer, name) for name in self.sets)
            if weights.input_ratio is not None
        ]
        return torch.ops.qoq.flex_linear(x, scaled, bias is not None, self.out_features, key)

    def run(
        self, x: torch.Tensor, scaled: list[torch.Tensor], add_bias: bool, context: ForwardContext
    ) -> torch.Tensor:
        """Compute with the set that this step uses; called by the op."""
        step = current_step(context, x.shape[0], self.policy)
        name, use_residual = choose(self.route, step, self.sets, self.policy)
        index = self._index_of_scaled.get(name)
        x = x if index is None else scaled[index]
        return self._weights[name].apply(x, add_bias, use_residual)

    def run_int8(
        self,
        quantized: QuantizedTokens,
        out_dtype: torch.dtype,
        add_bias: bool,
        context: ForwardContext,
    ) -> torch.Tensor:
        """Compute `run` for inputs that are quantized already; called by the op."""
        step = current_step(context, quantized[0].shape[0], self.policy)
        name, use_residual = choose(self.route, step, self.sets, self.policy)
        return self._weights[name].apply_int8(quantized, out_dtype, add_bias, use_residual)

    def weights(self, set_name: str) -> WeightSet:
        """Give the loaded weights of one set."""
        return self._weights[set_name]

    def follow_policy(self) -> None:
        """Take the route anew after `Policy.use`; steps that run eagerly follow it."""
        self.route = self.policy.routing.route(self.parts, fused_name=self.prefix)

    def _check_pairs(self) -> None:
        """Refuse nested sets that differ in more than the residual where a flag chooses."""
        for _, calm, busy in self.policy.pairs(self.route) if self.policy.has_graphs() else ():
            for name in ("bias", INPUT_RATIO):
                one, other = (getattr(self._weights[set_name], name) for set_name in (calm, busy))
                if (one is None) != (other is None) or (
                    one is not None and not torch.equal(one, other)
                ):
                    raise FormatError(
                        f"{self.prefix}: the sets {calm!r} and {busy!r} have a different {name}, "
                        "so CUDA graphs cannot follow routing.load from one to the other; serve "
                        "with --enforce-eager, or without 'load'"
                    )

    @contextmanager
    def _named(self, set_name: str, size: int, size_per_rank: int) -> Iterator[None]:
        """Put the layer, the set and the remedy in front of what an in-tree method refuses."""
        try:
            yield
        except (ValueError, AssertionError, RuntimeError) as error:
            remedy = (
                f"; this rank holds {size_per_rank} of {size} inputs, try a smaller "
                "--tensor-parallel-size"
                if size != size_per_rank
                else ""
            )
            raise FormatError(f"{self.prefix}, set {set_name!r}: {error}{remedy}") from error

    def _share_bias(self, layer: LinearBase, weights: WeightSet) -> None:
        if weights.bias is None:
            return
        if weights.set_name == next(iter(self.sets)):
            layer.bias.data.copy_(weights.bias.data)
        elif not torch.equal(layer.bias.data, weights.bias.data):
            raise FormatError(f"{self.prefix}: the sets have different biases")

    def _warm_up(self, weights: WeightSet) -> None:
        """Load and tune the kernels now, or the first step of a set would pay for it."""
        device = next(weights.parameters()).device
        if device.type != "cuda":
            return
        sizes: Any = weights  # copied from the layer, so mypy does not know them
        x = torch.zeros(1, sizes.input_size_per_partition, dtype=sizes.params_dtype, device=device)
        weights.apply(x, add_bias=False)
