"""The experts of one set in one layer, and the proof that the checkpoint filled them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe import FusedMoeWeightScaleSupported

from vllm_qoq.checkpoint.format import join_name
from vllm_qoq.errors import FormatError
from vllm_qoq.serving.methods.weight_set import DEVICE_ERRORS, REMEDY
from vllm_qoq.serving.vllm_versions import (
    FusedMoEMethodBase,
    RoutedExperts,
    experts_create_arguments,
)

# vLLM takes these from a layer of experts to compile DeepGEMM's kernels for them.
COMPILED_AHEAD = (
    *("w13_weight", "w13_weight_scale", "w13_weight_scale_inv"),
    *("w2_weight", "w2_weight_scale", "w2_weight_scale_inv"),
)
# vLLM acts on every module that has the first two, and acts on the layer already. On the layer,
# the others are those of one set.
_NOT_THE_LAYERS = ("quant_method", "load_weights", *COMPILED_AHEAD)
# vLLM computes these from what it loaded, though it gives them a loader.
_COMPUTED = "sort_indices"
# These are kept by few formats, for all experts or none.
_ORDER, _SHAPE = "g_idx", "weight_shape"
# The scales of quantized inputs have a default, and biases may be absent.
_INPUT_SCALE, _BIAS = "input_scale", "bias"
# By these names vLLM's loader knows what goes by the `quant_method` of its parameter.
_SCALES = ("scale", "zero", "offset")
_PER_TENSOR, _PER_CHANNEL = (
    FusedMoeWeightScaleSupported.TENSOR.value,
    FusedMoeWeightScaleSupported.CHANNEL.value,
)


class ExpertSet(nn.Module):
    """A child of a layer of experts that owns what one quantization method creates there.

    What it lacks, such as sizes and the map of experts to ranks, the method reads from the layer.
    Names in the checkpoint are `LAYER.NUMBER.PROJECTION.LEAF`.

    Its parameters are loaded by vLLM's own loader of the layer, which looks at the class of the
    layer's `quant_method`; so that gets a view in which the method of the set is in its place.
    """

    def __init__(
        self, layer: RoutedExperts, name: str, method: FusedMoEMethodBase, state: dict[str, Any]
    ) -> None:
        super().__init__()
        # These are plain attributes, because a module would own them, and some methods are modules.
        vars(self).update(_layer=layer, method=method)
        for key, value in state.items():
            setattr(self, key, value)
        self.set_name = name
        self._view = _LoaderView(self, method)
        self._expected: tuple[str, ...] = ()
        self._loaded: dict[str, set[tuple[int, str]]] = {}

    def __getattr__(self, name: str) -> Any:
        """Find what the method has not put here in the layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _NOT_THE_LAYERS:
                raise
            return getattr(self._layer, name)

    def create(self, sizes: dict[str, Any], is_padded: bool) -> None:
        """Let the method create its parameters.

        sizes      the arguments of the layer's `create_weights`
        is_padded  whether these are larger than the model's, so that files do not fill them
        """
        own = {"weight_loader": self._load, **experts_create_arguments(self._layer, self.method)}
        self.method.create_weights(layer=self, **sizes | own)
        self._is_padded = is_padded
        self._expected = tuple(
            name
            for name, parameter in self.named_parameters()
            if hasattr(parameter, "weight_loader") and parameter.numel() > 0
        )

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
        """Load tensors, named without the set and relative to the layer; gives parameters."""
        yield from RoutedExperts.load_weights(self._view, weights)

    def check_loaded(self, prefix: str) -> None:
        """Raise FormatError by tensor name unless every local expert's tensors were loaded."""
        lost = [name for leaf in self._expected for name in self._lost(prefix, leaf)]
        if lost:
            raise FormatError(
                f"{prefix}: the checkpoint did not fill {lost[0]} ({len(lost)} tensors of set "
                f"{self.set_name!r} are missing in this layer); {REMEDY}"
            )

    def check_values(self, prefix: str) -> None:
        """Raise FormatError by tensor name unless scales are positive and all numbers finite."""
        if self._is_padded:
            return  # what is beyond the model's sizes may hold anything
        for name in self._expected:
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
        self._loaded = {}
        self.method.process_weights_after_loading(self)
        if self.method.moe_quant_config is None:
            self.method.moe_quant_config = self.method.get_fused_moe_quant_config(self)

    def _load(
        self,
        param: Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Load one expert's tensor as vLLM does, and remember it; FormatError names the tensor."""
        leaf = weight_name.rpartition(".")[2]
        try:
            if self._view._map_global_expert_id_to_local_expert_id(expert_id) != -1:
                self._check_fits(param, loaded_weight, leaf, shard_id)
            success = RoutedExperts.weight_loader(
                self._view,
                param,
                loaded_weight,
                getattr(param, "loaded_as", weight_name),
                shard_id,
                expert_id,
                True,
            )
        except DEVICE_ERRORS:
            raise
        except (AssertionError, RuntimeError, ValueError, LookupError) as error:
            name = self._name(self._layer.layer_name, leaf, shard_id, expert_id)
            raise FormatError(
                f"{name} is {loaded_weight.dtype} {list(loaded_weight.shape)} in the checkpoint, "
                f"which does not go into this model's {param.dtype} {list(param.shape)} of all "
                f"experts ({error}); {REMEDY}"
            ) from error
        if success:
            self._loaded.setdefault(leaf, set()).add((expert_id, shard_id))
        return success if return_success else None

    def _check_fits(self, param: Parameter, tensor: torch.Tensor, leaf: str, shard_id: str) -> None:
        """Raise ValueError for what vLLM's loader would convert, cut or leave unfilled."""
        if _SHAPE in leaf:
            return  # vLLM keeps it in whatever type is the default
        if param.is_floating_point() != tensor.is_floating_point():
            raise ValueError("numbers of another kind")
        if self._is_padded or _ORDER in leaf:
            return
        needed = self._stored_numbers(param, leaf, shard_id)
        found = tensor.numel() * self._refinement(leaf)
        if found != needed:
            raise ValueError(f"{found} numbers where {needed} are needed")

    def _stored_numbers(self, param: Parameter, leaf: str, shard_id: str) -> int:
        """Count the numbers that one expert's tensor has on all ranks together."""
        size = param[0].numel()
        kind, is_scale = getattr(param, "quant_method", None), any(s in leaf for s in _SCALES)
        if shard_id != "w2":
            # Gate and up are the halves of one parameter, of which input scales are for both.
            is_half = self.moe_config.is_act_and_mul and size > 1
            size //= 2 if is_half else 1
            is_whole = (is_scale and kind == _PER_TENSOR) or _INPUT_SCALE in leaf
        else:
            # The outputs of w2 are those of all ranks, and so is what stands beside them.
            is_whole = (is_scale and kind in (_PER_TENSOR, _PER_CHANNEL)) or _BIAS in leaf
            is_whole |= _INPUT_SCALE in leaf or getattr(param, "load_full_w2", False)
        return size * (1 if is_whole else self.moe_config.tp_size)

    def _refinement(self, leaf: str) -> int:
        """Tell how often vLLM repeats each scale for smaller blocks than those in the files."""
        blocks = getattr(self.method, "weight_scale_refine", None)
        return math.prod(blocks) if blocks is not None and "scale" in leaf else 1

    def _lost(self, prefix: str, leaf: str) -> Iterator[str]:
        if _COMPUTED in leaf or leaf.endswith((_INPUT_SCALE, _BIAS)):
            return
        loaded = self._loaded.get(leaf, set())
        if _ORDER in leaf and not loaded and not self._reads_order():
            return
        shards = ("w2",) if leaf.startswith("w2") else shards_of_w13(self._layer)
        for expert in self._local_experts():
            for shard in shards:
                if (expert, shard) not in loaded:
                    yield self._name(prefix, leaf, shard, expert)

    def _reads_order(self) -> bool:
        """Whether the method computes with the order of columns in `g_idx`."""
        if hasattr(self.method, "actorder"):  # compressed-tensors
            return self.method.actorder == "group"
        return bool(getattr(getattr(self.method, "quant_config", None), "desc_act", False))

    def _local_experts(self) -> Iterator[int]:
        """List the experts of this rank, by their numbers in the checkpoint."""
        for expert in range(self.global_num_experts):
            if self._view._map_global_expert_id_to_local_expert_id(expert) != -1:
                yield expert

    def _name(self, prefix: str, leaf: str, shard_id: str, expert_id: int) -> str:
        """Find a tensor's name in the checkpoint."""
        name = stored_name(self._layer, prefix, leaf, shard_id, expert_id)
        return join_name(self.set_name, name)


def shards_of_w13(layer: RoutedExperts) -> tuple[str, ...]:
    """List what vLLM puts into the parameter w13 of an expert: w1 is gate and w3 is up."""
    return ("w1", "w3") if layer.moe_config.is_act_and_mul else ("w1",)


def stored_name(layer: RoutedExperts, prefix: str, leaf: str, shard_id: str, expert_id: int) -> str:
    """Name the tensor of one expert as the checkpoint does, without a set.

    prefix  the layer's name
    leaf    the parameter, `w13_weight`
    """
    projection = {
        "w1": layer.ckpt_gate_proj_name,
        "w2": layer.ckpt_down_proj_name,
        "w3": layer.ckpt_up_proj_name,
    }[shard_id]
    return f"{prefix}.{expert_id}.{projection}.{leaf.partition('_')[2]}"


class _LoaderView:
    """A layer of experts with the parameters and the method of one set, for vLLM's loader."""

    def __init__(self, own: ExpertSet, method: FusedMoEMethodBase) -> None:
        self._own, self.quant_method = own, method

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)
