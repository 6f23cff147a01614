"""A mixture of experts that holds one child module per set and computes with the one of the step.

It stands where vLLM has the quantization method of a layer of experts. Each set brings a method of
vLLM's own, or any other `FusedMoEMethodBase`, which creates, loads and computes in an `ExpertSet`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.forward_context import ForwardContext, get_forward_context

from vllm_qoq.errors import FormatError, UserError, shown
from vllm_qoq.routing.table import LayerRoute
from vllm_qoq.serving.methods import flex_moe_op  # noqa: F401  (defines torch.ops.qoq.flex_moe)
from vllm_qoq.serving.methods.expert_set import COMPILED_AHEAD, ExpertSet
from vllm_qoq.serving.methods.qoq_residual_experts import QoQResidualExpertsMethod
from vllm_qoq.serving.methods.weight_set import DEVICE_ERRORS, UNTRACKED_LOADERS
from vllm_qoq.serving.routing.choose import choose
from vllm_qoq.serving.routing.policy import Policy
from vllm_qoq.serving.routing.step import current_step
from vllm_qoq.serving.vllm_versions import (
    FusedMoEMethodBase,
    RoutedExperts,
    encode_layer_name,
)

# The names that reach the layer: NUMBER.PROJECTION.SET.LEAF
_TENSOR = re.compile(r"(?P<expert>\d+\.[^.]+)\.(?P<set>[^.]+)\.(?P<leaf>[^.]+)")

# vLLM's runner of a layer asks the method for these, once for all steps.
_ASKED: dict[str, Callable[[FusedMoEMethodBase], Any]] = {
    "kernels that choose the experts themselves": lambda method: method.is_monolithic,
    "the type of the experts' numbers": lambda method: method.topk_indices_dtype,
    "outputs summed over all ranks": lambda method: (
        method.moe_kernel is not None and method.moe_kernel.output_is_reduced()
    ),
    "shared experts inside the kernel": lambda method: method.mk_can_overlap_shared_experts,
    "inputs without padding": lambda method: method.skip_forward_padding,
    "outputs without padding": lambda method: method.has_unpadded_output,
}


@dataclass(frozen=True)
class ExpertsMethod:
    """The method by which one set computes experts, and the state that it left on the layer."""

    method: FusedMoEMethodBase
    state: dict[str, Any]
    base: str | None = None  # the set to whose weights this one adds a residual


class FlexMoEMethod(FusedMoEMethodBase):
    """Routes one mixture of experts among the sets that its route can reach.

    prefix  the layer's name in vLLM, `model.layers.0.mlp.experts`
    """

    def __init__(
        self,
        layer: RoutedExperts,
        prefix: str,
        sets: dict[str, ExpertsMethod],
        route: LayerRoute,
        policy: Policy,
    ) -> None:
        super().__init__(layer.moe_config)
        _check_parallel(layer, prefix, sorted(policy.reachable(route)))
        self.prefix, self.sets = prefix, sets
        self.route, self.policy = route, policy
        self.key = f"{prefix}.qoq"
        self._first = next(iter(sets.values())).method
        self._is_padded = self._is_finished = False
        self._experts: dict[str, ExpertSet] = {}
        self._ahead: Any = None
        self._check_alike()

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *rest: Any, **more: Any
    ) -> tuple[int, int]:
        """Round the sizes up as all sets do; FormatError where they do not agree."""
        sizes = (hidden_size, intermediate_size_per_partition)
        found = {
            name: choice.method.maybe_roundup_sizes(*sizes, *rest, **more)
            for name, choice in self.sets.items()
        }
        self._check_equal("sizes of padded experts", found)
        rounded = found[next(iter(found))]
        self._is_padded = rounded != sizes
        return rounded

    def create_weights(self, layer: RoutedExperts, **sizes: Any) -> None:
        """Add one `ExpertSet` per set and make the layer known to the op."""
        vllm_config = get_current_vllm_config()
        self.is_tracked = vllm_config.load_config.load_format not in UNTRACKED_LOADERS
        for name, choice in self.sets.items():
            if hasattr(layer, name):
                raise FormatError(f"{self.prefix} has an attribute {name!r}; rename the set")
            experts = ExpertSet(layer, name, choice.method, choice.state)
            with named_refusals(self.prefix, name):
                experts.create(sizes, self._is_padded)
            layer.add_module(name, experts)
            self._experts[name] = experts
        for choice in self.sets.values():
            if choice.base is not None:
                assert isinstance(choice.method, QoQResidualExpertsMethod)
                choice.method.base = self._experts[choice.base]
        layer.load_weights = self._load  # of this instance, because names have a set in them
        layers = vllm_config.compilation_config.static_forward_context
        if self.key in layers:
            raise ValueError(f"two layers are named {self.prefix!r}")
        layers[self.key] = layer

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check that every tensor arrived, then let each set prepare its weights."""
        self.policy.check_rules()
        for experts in self._experts.values() if self.is_tracked else ():
            experts.check_loaded(self.prefix)
            experts.check_values(self.prefix)
        # A residual is checked with its base's weights as they were loaded.
        for name in sorted(self.sets, key=lambda name: self.sets[name].base is None):
            with named_refusals(self.prefix, name):
                self._experts[name].finish()
        self._check_alike()
        methods = [choice.method for choice in self.sets.values()]
        shown = next(filter(_may_be_compiled_ahead, methods), self._first)
        # The runner dispatches tokens itself where a method has no kernel of vLLM's modular kind.
        has_kernels = all(method.moe_kernel is not None for method in methods)
        self.moe_kernel = shown.moe_kernel if has_kernels else None
        self.moe_quant_config = shown.moe_quant_config
        if has_kernels and _may_be_compiled_ahead(shown):
            self._ahead = shown.moe_quant_config
            experts = next(one for one in self._experts.values() if one.method is shown)
            found = {leaf: getattr(experts, leaf, None) for leaf in COMPILED_AHEAD}
            vars(layer).update({leaf: one for leaf, one in found.items() if one is not None})
        self._is_finished = True

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> Any:
        """Give that of a set whose kernels vLLM compiles ahead, for the weights on the layer.

        DeepGEMM compiles by the sizes of the weights, which are equal in all sets. None where no
        set has such kernels, because each computes with its own config.
        """
        return self._ahead

    @property
    def is_monolithic(self) -> bool:
        """Whether kernels choose the experts themselves, which all sets' do or none's."""
        return bool(self._first.is_monolithic)

    @property
    def skip_forward_padding(self) -> bool:
        """Whether the inputs are not padded, as all sets have it."""
        return bool(self._first.skip_forward_padding)

    @property
    def has_unpadded_output(self) -> bool:
        """Whether the outputs are not padded, as all sets have it."""
        return bool(self._first.has_unpadded_output)

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Call the opaque op; torch.compile traces this where vLLM has no op around it."""
        if shared_experts is not None and self.mk_can_overlap_shared_experts:
            # Only kernels for several GPUs do, around which vLLM has its own op.
            shared = (shared_experts, shared_experts_input)
            return self.run(get_forward_context(), x, topk_weights, topk_ids, *shared)
        return torch.ops.qoq.flex_moe(x, topk_weights, topk_ids, self._width(x), self._name())

    def apply_monolithic(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Call the opaque op, as `apply` does."""
        return torch.ops.qoq.flex_moe_monolithic(
            x, router_logits, input_ids, self._width(x), self._name()
        )

    def run(
        self,
        context: ForwardContext,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute with the set that this step uses; called by the op."""
        (chosen, *others), use_residual = self._choose(context, x.shape[0])
        for experts in others:
            experts.method.apply(experts, x, topk_weights, topk_ids, None, None)
        if use_residual is not None:
            assert isinstance(chosen.method, QoQResidualExpertsMethod)
            return chosen.method.compute(chosen, x, topk_weights, topk_ids, use_residual)
        shared = (shared_experts, shared_experts_input)
        return chosen.method.apply(chosen, x, topk_weights, topk_ids, *shared)

    def run_monolithic(
        self,
        context: ForwardContext,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute `run` with kernels that choose the experts themselves."""
        (chosen, *others), _ = self._choose(context, x.shape[0])
        for experts in others:
            _monolithic(experts, x, router_logits, input_ids)
        return _monolithic(chosen, x, router_logits, input_ids)

    def experts(self, set_name: str) -> ExpertSet:
        """Give the loaded experts of one set."""
        return self._experts[set_name]

    def follow_policy(self) -> None:
        """Take the route anew after `Policy.use`; steps that run eagerly follow it."""
        self.route = self.policy.routing.route([self.prefix])

    def _choose(
        self, context: ForwardContext, num_tokens: int
    ) -> tuple[list[ExpertSet], torch.Tensor | None]:
        """Choose the set of this step, which comes first.

        Where only the device knows the state, it is a nested set, with the flag that says whether
        the whole set is meant or its base alone.

        In vLLM's profiling and warm-up runs all others follow, so that kernels are compiled and
        vLLM sees the memory that they take; after these its workspaces do not grow any more.
        """
        step = current_step(context, num_tokens, self.policy)
        name, use_residual = choose(self.route, step, self.sets, self.policy)
        chosen = self._experts[name]
        is_captured = context.cudagraph_runtime_mode is not CUDAGraphMode.NONE
        if context.attn_metadata is not None or is_captured or len(self._experts) == 1:
            return [chosen], use_residual
        others = [one for one in self._experts.values() if one is not chosen]
        return [chosen, *others], use_residual

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
        """Load tensors by set; gives the names of filled parameters, relative to the layer."""
        if self._is_finished:
            raise UserError(
                f"{self.prefix}: experts in sets cannot be loaded anew into a running engine; "
                "start the engine again"
            )
        for name, run in groupby(map(self._split, weights), key=lambda item: item[0]):
            for filled in self._experts[name].load((tensor, data) for _, tensor, data in run):
                yield f"{name}.{filled}"

    def _split(self, weight: tuple[str, torch.Tensor]) -> tuple[str, str, torch.Tensor]:
        """Split a name into the set and the name without it."""
        name, data = weight
        match = _TENSOR.fullmatch(name)
        if match is None or match["set"] not in self._experts:
            raise FormatError(
                f"{self.prefix}.{name}: experts are stored once for each of the sets "
                f"{', '.join(self._experts)}, one tensor for each expert, and this is none of "
                "these; run `vllm-qoq verify` on the checkpoint"
            )
        return match["set"], f"{match['expert']}.{match['leaf']}", data

    def _check_alike(self) -> None:
        """Raise FormatError where sets answer vLLM's runner differently."""
        for what, ask in _ASKED.items():
            self._check_equal(what, {n: ask(choice.method) for n, choice in self.sets.items()})

    def _check_equal(self, what: str, found: dict[str, Any]) -> None:
        (first, value), *others = found.items()
        for name, other in others:
            if other != value:
                raise FormatError(
                    f"{self.prefix}: the sets {first!r} and {name!r} cannot run in one engine, "
                    f"because vLLM chose kernels for them that differ in one thing, {what}: "
                    f"{shown(value)} and {shown(other)}; choose other kernels with --moe-backend, "
                    "or serve one set with force_set"
                )

    def _width(self, x: torch.Tensor) -> int:
        return self.moe.hidden_dim_unpadded if self.has_unpadded_output else x.shape[-1]

    def _name(self) -> Any:
        return encode_layer_name(self.key)


@contextmanager
def named_refusals(prefix: str, set_name: str, *also: type[Exception]) -> Iterator[None]:
    """Put the layer, the set and the remedy in front of what an in-tree method refuses.

    also  what else vLLM refuses by here

    Other errors, such as a lack of memory or of kernels, are none of the checkpoint's and stay.
    """
    refusals: tuple[type[Exception], ...] = (ValueError, AssertionError, NotImplementedError)
    try:
        yield
    except (FormatError, *DEVICE_ERRORS):
        raise
    except refusals + also as error:
        raise FormatError(
            f"{prefix}: vLLM does not serve the experts of set {set_name!r} here: {error}; try "
            "another --tensor-parallel-size or GPU, or serve another set with force_set"
        ) from error


@contextmanager
def same_sizes(layer: RoutedExperts, prefix: str, set_name: str) -> Iterator[None]:
    """Raise FormatError where a set's method changes the sizes of the layer's experts.

    vLLM does that for fp8 in blocks that no slice of a rank holds whole, and loads by these sizes
    what other sets have, too.
    """
    config = layer.moe_config
    before = dict(vars(config))
    try:
        yield
        if getattr(config, "tp_shard_with_padding", False):
            raise FormatError(
                f"{prefix}: vLLM fills up the slices of set {set_name!r} at --tensor-parallel-size "
                f"{config.tp_size} to whole blocks of fp8, and the experts of other sets have none "
                "to fill up; start without --moe-backend, with --enable-expert-parallel or another "
                "--tensor-parallel-size, or serve another set with force_set"
            )
    except BaseException:
        vars(config).update(before)
        raise


def _check_parallel(layer: RoutedExperts, prefix: str, sets: Sequence[str]) -> None:
    """Raise UserError where the engine spreads experts in a way that routing cannot follow.

    sets  those that steps run in; a base that only a nested set reads is none of them
    """
    parallel = layer.moe_config.moe_parallel_config
    if parallel.enable_eplb:
        raise UserError(
            f"{prefix}: --enable-eplb moves experts between ranks, and experts in sets stay where "
            "they are; start without --enable-eplb"
        )
    if parallel.dp_size > 1 and len(sets) > 1:
        raise UserError(
            f"{prefix}: --data-parallel-size {parallel.dp_size} shares the experts out over "
            f"engines, of which each would choose among {', '.join(sets)} for itself; use "
            "--tensor-parallel-size, with --enable-expert-parallel if you like, or serve one set "
            "with force_set"
        )


def _may_be_compiled_ahead(method: FusedMoEMethodBase) -> bool:
    """Whether the weights are in blocks of fp8, as those are that DeepGEMM computes with."""
    return getattr(method.moe_quant_config, "block_shape", None) is not None


def _monolithic(
    experts: ExpertSet,
    x: torch.Tensor,
    router_logits: torch.Tensor,
    input_ids: torch.Tensor | None,
) -> torch.Tensor:
    # Some methods of older versions do not take the argument.
    more = {} if input_ids is None else {"input_ids": input_ids}
    return experts.method.apply_monolithic(experts, x, router_logits, **more)
