"""The weights of one set in one linear layer, and the proof that the checkpoint filled them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, QKVParallelLinear
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_qoq.checkpoint.format import INPUT_RATIO, join_name
from vllm_qoq.errors import FormatError
from vllm_qoq.models.names import shards_of_parts
from vllm_qoq.serving.methods.after_loading import AfterLoading
from vllm_qoq.serving.methods.qoq_linear import QuantizedTokens
from vllm_qoq.serving.vllm_versions import has_loader_v2

# Loaders that fill parameters without their weight_loader and check completeness themselves.
UNTRACKED_LOADERS = ("dummy", "sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache")

Loader = Callable[..., Any]

REMEDY = "run `vllm-qoq verify` on the checkpoint, download or quantize it again"

# RuntimeErrors, as loaders raise for a tensor that does not fit, but none of the checkpoint's.
DEVICE_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)

# Tensors with so few elements are sizes, such as compressed-tensors' weight_shape [2].
_MOST_COUNTED_TWICE = 4


class WeightSet(nn.Module):
    """A child of a linear layer that owns what one quantization method creates there.

    Quantization methods give their parameters equal names (`weight_scale` in
    both W8A8 and W4A16) and keep state on the layer. With a child per set they
    do not meet, and tensors load as `LAYER.SET.LEAF` through vLLM's own loaders.

    Its `quant_method` is for weights that are loaded anew into a running engine, which vLLM does
    module by module: at the first load its layer has it finished before vLLM comes to it.
    """

    def __init__(
        self,
        layer: LinearBase,
        name: str,
        method: LinearMethodBase,
        state: dict[str, Any],
        parts: list[str],
        is_tracked: bool,
    ) -> None:
        super().__init__()
        self._is_finished = False
        for key, value in vars(layer).items():
            # These are sizes, dtypes and tensor-parallel facts, which methods ask the layer for.
            if not key.startswith("_") and key not in ("training", "quant_method"):
                setattr(self, key, value)
        for key, value in state.items():
            setattr(self, key, value)
        self.set_name, self.prefix, self.parts = name, layer.prefix, parts
        self.is_tracked, self.params_dtype = is_tracked, layer.params_dtype
        self.linear_method = method
        self.quant_method = _Reload()
        self._expected: tuple[str, ...] = ()
        self._loaded: dict[int, set[Any]] = {}

    def create(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        params_dtype: torch.dtype,
        has_input_ratio: bool,
        **sizes: Any,
    ) -> None:
        """Let the method create its parameters, plus this set's bias and input ratio."""
        uses_v2 = has_loader_v2(self.linear_method) and hasattr(layer, "weight_loader_v2")
        self.linear_method.create_weights(
            self,
            input_size_per_partition,
            output_partition_sizes,
            params_dtype=params_dtype,
            weight_loader=self._recorded(
                layer.weight_loader_v2 if uses_v2 else layer.weight_loader
            ),
            **sizes,
        )
        self._sizes = _sizes(layer)
        self.shard_ids = tuple(self._sizes)
        self._outputs = sum(output_partition_sizes)
        self._ranks_of_input = layer.input_size // input_size_per_partition
        self.bias: Parameter | None = self._bias(layer, sum(output_partition_sizes), params_dtype)
        self.input_ratio = (
            self._input_ratio(layer, input_size_per_partition) if has_input_ratio else None
        )
        self._expected = tuple(
            name
            for name, parameter in self.named_parameters()
            # A parameter without a loader is built from the config, an empty one holds nothing.
            if hasattr(parameter, "weight_loader") and parameter.numel() > 0
        )

    def check_loaded(self, prefix: str, parts: list[str]) -> None:
        """Raise FormatError by tensor name unless every tensor of this set was loaded."""
        for name in self._expected:
            parameter = getattr(self, name)
            # vLLM begins to process a layer that it loads anew when the number of elements is
            # reached, and counts such sizes once for each of a fused layer's parts.
            if self._is_finished and parameter.numel() <= _MOST_COUNTED_TWICE:
                continue
            shards = self._loaded.get(id(parameter), set())
            if None in shards or len(shards) == len(self.shard_ids):
                continue
            lost = [
                join_name(self.set_name, f"{part}.{name}")
                for part, filled in shards_of_parts(parts, self.shard_ids)
                if not shards.issuperset(filled)
            ]
            raise FormatError(
                f"{prefix}: the checkpoint did not fill {lost[0]} ({len(lost)} tensors of set "
                f"{self.set_name!r} are missing in this layer). Run `vllm-qoq verify` on the "
                "checkpoint; if it passes, this architecture has a loader of its own: serve with "
                """--hf-overrides '{"architectures": ["FlexQuant<ARCHITECTURE>"]}'"""
            )

    def check_values(self, prefix: str) -> None:
        """Raise FormatError by tensor name unless scales are positive and all numbers finite.

        A method may say which tensors it checks itself (`checked_tensors`), by checkpoint layer.
        """
        checked: frozenset[str] = getattr(self.linear_method, "checked_tensors", frozenset())
        for name in (name for name in self._expected if name not in checked):
            values = getattr(self, name).data
            if not values.is_floating_point() or values.element_size() == 1:
                continue
            low, high = torch.stack(torch.aminmax(values)).tolist()
            is_finite = math.isfinite(low) and math.isfinite(high)
            if is_finite and (low > 0 or "scale" not in name):
                continue
            wrong = "a scale that is not positive" if is_finite else "NaN or infinity"
            raise FormatError(f"{prefix}: {name} of set {self.set_name!r} holds {wrong}; {REMEDY}")

    def finish(self) -> None:
        """Bring the loaded weights into the form that the method's kernel reads."""
        # Otherwise the parameters as loaded would stay in memory beside what is made of them.
        self._loaded, self._is_finished = {}, False
        for name in (*self._parameters, *self._buffers):
            vars(self).pop(name, None)
        if self.bias is not None and self.bias.numel() == 0:
            self.bias = None
        try:
            self.linear_method.process_weights_after_loading(self)
        except FormatError as error:
            raise FormatError(f"set {self.set_name!r}: {error}") from None
        # Parameters become plain attributes as well, because a module finds parameters by a slower
        # way, which methods take several times per call. Assigning one anew removes the plain one.
        vars(self).update(self._parameters | self._buffers)
        self._is_finished = True

    def __delattr__(self, name: str) -> None:
        """Delete an attribute, and the plain copy that a parameter or buffer has."""
        if name in self._parameters or name in self._buffers:
            vars(self).pop(name, None)
        super().__delattr__(name)

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """Register a parameter, also as the plain attribute where vLLM puts a kernel's back."""
        super().register_parameter(name, param)
        if self._is_finished:
            vars(self)[name] = param

    def register_buffer(
        self, name: str, tensor: torch.Tensor | None, persistent: bool = True
    ) -> None:
        """Register a buffer, also as the plain attribute where vLLM puts a kernel's back."""
        super().register_buffer(name, tensor, persistent)
        if self._is_finished:
            vars(self)[name] = tensor

    def reload(self) -> None:
        """Check and `finish` what vLLM has loaded anew, in an engine that serves already."""
        if not self._loaded:
            return
        if self.is_tracked:
            self.check_loaded(self.prefix, self.parts)
            self.check_values(self.prefix)
        # The default dtype is that of the first load, because vLLM's W8A8 on a CPU writes its
        # outputs in it.
        with set_default_torch_dtype(self.params_dtype):
            self.finish()
        self._held = held_by_kernel(self)

    def apply(  # type: ignore[override]
        self, x: torch.Tensor, add_bias: bool, use_residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute y = x @ W.T + bias, x [..., in_features] already multiplied by `input_ratio`.

        use_residual  int32 [1] on the device, for a nested set: 0 computes with its base alone
        """
        flag = () if use_residual is None else (use_residual,)
        return self.linear_method.apply(self, x, self.bias if add_bias else None, *flag)

    def apply_int8(
        self,
        quantized: QuantizedTokens,
        out_dtype: torch.dtype,
        add_bias: bool,
        use_residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute `apply` of a QoQ set for inputs that are quantized already."""
        flag = () if use_residual is None else (use_residual,)
        bias = self.bias if add_bias else None
        return self.linear_method.apply_int8(self, quantized, bias, out_dtype, *flag)

    def _recorded(self, load: Loader) -> Loader:
        # vLLM's loading anew exchanges the argument that is named `param`.
        def load_and_record(param: Parameter, tensor: torch.Tensor, *shard: Any) -> None:
            shard_id = shard[0] if shard else None
            # One tensor may fill several shards.
            filled = shard_id if isinstance(shard_id, tuple) else (shard_id,)
            try:
                self._check_fits(param, tensor, filled)
                load(param, tensor, *shard)
            except (FormatError, *DEVICE_ERRORS):
                raise
            except (AssertionError, RuntimeError, ValueError, LookupError) as error:
                raise FormatError(
                    f"{self.prefix}: {self._name_of(param, shard_id)} is {tensor.dtype} "
                    f"{list(tensor.shape)} in the checkpoint, which does not go into this model's "
                    f"{param.dtype} {list(param.shape)} ({error}); {REMEDY}"
                ) from error
            self._loaded.setdefault(id(param), set()).update(filled)

        return load_and_record

    def _check_fits(self, param: Parameter, tensor: torch.Tensor, shards: tuple[Any, ...]) -> None:
        """Raise ValueError for what vLLM's loaders would convert or cut to size."""
        if param.is_floating_point() != tensor.is_floating_point():
            raise ValueError("numbers of another kind")
        dim = getattr(param, "output_dim", None)
        # Otherwise the dimension is packed or in blocks, and vLLM's loaders know how.
        if dim is not None and tensor.ndim > dim and param.shape[dim] == self._outputs:
            rows = sum(sum(self._sizes.values()) if s is None else self._sizes[s] for s in shards)
            if tensor.shape[dim] != rows:
                raise ValueError(f"{rows} outputs are needed")
        dim = getattr(param, "input_dim", None)
        if dim is not None and tensor.ndim > dim:
            columns = getattr(param, "stored_columns", param.shape[dim] * self._ranks_of_input)
            if tensor.shape[dim] != columns:
                raise ValueError(f"dimension {dim} has to be {columns}")

    def _name_of(self, param: Parameter, shard_id: Any) -> str:
        """Find a parameter's name in the checkpoint."""
        leaf = next((name for name, own in self.named_parameters() if own is param), "a tensor")
        filled = shard_id if isinstance(shard_id, tuple) else (shard_id,)
        parts = {shards: part for part, shards in shards_of_parts(self.parts, self.shard_ids)}
        return join_name(self.set_name, f"{parts.get(filled, self.prefix)}.{leaf}")

    def _bias(self, layer: LinearBase, size: int, dtype: torch.dtype) -> Parameter:
        """Make the bias of this set, which is its own because kernels convert it in place."""
        if not layer.has_bias:
            bias = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(bias, {"weight_loader": _only_zero_bias})
            return bias
        bias = Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        loader = self._recorded(layer.weight_loader)
        set_weight_attrs(bias, {"output_dim": 0, "weight_loader": loader})
        return bias

    def _input_ratio(self, layer: LinearBase, size: int) -> Parameter:
        ratio = Parameter(torch.empty(size, dtype=torch.float32), requires_grad=False)
        is_row_parallel = size != layer.input_size

        def load(parameter: Parameter, tensor: torch.Tensor, *shard: Any) -> None:
            if is_row_parallel:
                tensor = tensor.narrow(0, layer.tp_rank * size, size)
            if tensor.shape != parameter.shape:
                raise FormatError(
                    f"{layer.prefix}: {INPUT_RATIO} of set {self.set_name!r} has shape "
                    f"{list(tensor.shape)}, the layer reads {list(parameter.shape)}"
                )
            if id(parameter) not in self._loaded:
                parameter.data.copy_(tensor)
            # When vLLM loads anew, it first counts elements, without memory.
            elif not parameter.is_meta and not torch.equal(parameter.data.cpu(), tensor.cpu()):
                raise FormatError(
                    f"{layer.prefix}: the fused projections of set {self.set_name!r} read one "
                    f"input, but their {INPUT_RATIO} tensors differ"
                )

        set_weight_attrs(ratio, {"weight_loader": self._recorded(load)})
        return ratio


def held_by_kernel(module: nn.Module) -> list[Parameter]:
    """List the parameters that have to outlive loading anew, after which vLLM puts others there.

    vLLM's W8A8 kernel for the CPU keeps the addresses of scales that it was made with.
    """
    return [
        parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.device.type == "cpu" and ("scale" in name or "azp" in name)
    ]


class _Reload(AfterLoading):
    """Makes vLLM finish a `WeightSet` whose parameters have been loaded anew."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Finish the set, unless its layer has."""
        assert isinstance(layer, WeightSet)
        layer.reload()


def _sizes(layer: LinearBase) -> dict[Any, int]:
    """Count the outputs of each part of a layer on all ranks together, by the shard's id."""
    if isinstance(layer, QKVParallelLinear):
        heads, kv_heads = layer.total_num_heads, layer.total_num_kv_heads
        return {
            "q": heads * layer.head_size,
            "k": kv_heads * layer.head_size,
            "v": kv_heads * layer.v_head_size,
        }
    return dict(enumerate(getattr(layer, "output_sizes", (layer.output_size,))))


def _only_zero_bias(param: Parameter, tensor: torch.Tensor, *shard: Any) -> None:
    # GPTQ tools write a zero bias for layers that have none.
    if torch.count_nonzero(tensor):
        raise FormatError("the checkpoint has a bias for a layer that has none in this model")
