"""A rank of an engine in vLLM that `tune` measures: its part of the layers and of a step.

The engine runs eagerly, so the layers can be called, and their routes changed between two steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.forward_context import get_forward_context

from vllm_qoq.measuring import gpu as timing
from vllm_qoq.measuring.host import host_seconds
from vllm_qoq.models.names import LM_HEAD
from vllm_qoq.routing.table import Phase, Routing
from vllm_qoq.serving.methods.routed_linear import FlexLinearMethod
from vllm_qoq.serving.methods.steering import Steering
from vllm_qoq.serving.methods.weight_set import WeightSet
from vllm_qoq.serving.routing.policy import Policy
from vllm_qoq.serving.routing.step import current_step
from vllm_qoq.tuner.engine import LayerGroup

# Layers of one shape are called in turn until their weights are more than any cache holds.
_CACHES_BYTES = 1 << 30
# While the GPU sleeps so long, 0.1 s at 2 GHz, the CPU launches a whole step.
_SLEEP_CYCLES = 200_000_000


class TuneWorker:
    """An extension of vLLM's workers (`worker_extension_cls`), whose methods every rank runs."""

    get_model: Any  # these are the worker's
    vllm_config: Any

    def tune_groups(self) -> list[LayerGroup] | str:
        """Find the routed linear layers and group them by shape, or say why there is no group."""
        found = Steering(self.get_model())
        if found.experts:
            return (
                f"{found.experts[0].prefix}: experts in sets are not timed yet; write the routing "
                "by hand"
            )
        if not found.linears:
            return "no linear layer is quantized in any set, so none can be measured"
        self._tune_steering = found
        groups = _by_shape(found.linears)
        self._tune_methods = {group.name: methods for group, methods in groups.items()}
        self._tune_inputs: dict[tuple[int, int], torch.Tensor] = {}
        return list(groups)

    def tune_linear_seconds(self, layers: LayerGroup, set_name: str, tokens: int) -> float:
        """Measure `WeightSet.apply`, with quantization of the input and without an input_ratio.

        The product with the ratio is part of the norm's kernel in a compiled model.
        """
        weights = [method.weights(set_name) for method in self._tune_methods[layers.name]]
        total = 0
        for count, one in enumerate(weights, 1):
            total += _weight_bytes(one)
            if total >= _CACHES_BYTES:
                weights = weights[:count]
                break
        x = self._tune_input(tokens, layers.in_features)

        def call_of(one: WeightSet) -> Callable[[], object]:
            # A call returns nothing, because 32 outputs of 8192 tokens would be 15 GB.
            def call() -> None:
                one.apply(x, add_bias=False)

            return call

        return self._tune_seconds([call_of(one) for one in weights])

    def tune_head_seconds(self, tokens: int) -> float | None:
        """Measure this rank's part of the lm_head; None if the model has none of that name."""
        head = getattr(self.get_model(), LM_HEAD, None)
        method: Any = getattr(head, "quant_method", None)
        if method is None:
            return None
        x = self._tune_input(tokens, self.vllm_config.model_config.get_hidden_size())

        def call() -> None:
            method.apply(head, x)

        return self._tune_seconds([call])

    def tune_begin_steps(self, routing: Routing, batch: int) -> None:
        """Follow `routing`, and time decode steps of `batch` requests from now on."""
        self._tune_steering.follow(routing)
        timer = _ForwardTimer(self._tune_steering.linears[0].policy, batch)
        model = self.get_model()
        self._tune_timer = timer
        self._tune_hooks = (
            model.register_forward_pre_hook(timer.before),
            model.register_forward_hook(timer.after),
        )

    def tune_end_steps(self) -> list[float]:
        """Stop timing; the seconds of this rank's forward pass in each step, in their order."""
        for hook in self._tune_hooks:
            hook.remove()
        return self._tune_timer.seconds()

    def _tune_input(self, tokens: int, features: int) -> torch.Tensor:
        key = tokens, features
        if key not in self._tune_inputs:
            self._tune_inputs = {}  # Only the last one is kept.
            x = torch.randn(key, device=self._tune_device())
            self._tune_inputs[key] = x.to(self.vllm_config.model_config.dtype)
        return self._tune_inputs[key]

    def _tune_device(self) -> str:
        return str(self.vllm_config.device_config.device_type)

    def _tune_seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        with torch.inference_mode(), set_current_vllm_config(self.vllm_config):
            if self._tune_device() != "cuda":
                return host_seconds(calls)
            seconds = timing.seconds(calls)
            torch.cuda.empty_cache()  # gives back the memory of the graph
            return seconds


class _ForwardTimer:
    """A pair of hooks around the model that time its decode steps of `batch` requests.

    A GPU computes a small step in less time than the CPU needs to launch it eagerly, which
    CUDA graphs make up for. So the GPU sleeps first, until everything is launched.
    """

    def __init__(self, policy: Policy, batch: int) -> None:
        self._policy, self._batch = policy, batch
        self._times: list[Callable[[], float]] = []

    def before(self, *_: object) -> None:
        """Note when a step begins."""
        if torch.cuda.is_available():
            torch.cuda._sleep(_SLEEP_CYCLES)
        self._started = _Instant()

    def after(self, *_: object) -> None:
        """Note when a step ends, and keep its time if it was one of those to be measured."""
        started, ended = self._started, _Instant()
        # The first layer has left its decision in the forward context.
        step = current_step(get_forward_context(), 0, self._policy)
        if step.phase is Phase.DECODE and step.batch == self._batch:
            self._times.append(lambda: ended.since(started))

    def seconds(self) -> list[float]:
        """Compute the seconds of each step."""
        return [time() for time in self._times]


class _Instant:
    """A moment on the clock of the device; on a GPU, in the order of the current stream."""

    def __init__(self) -> None:
        self._event: Any = None
        if torch.cuda.is_available():
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        self._seconds = time.perf_counter()

    def since(self, earlier: _Instant) -> float:
        """Compute the seconds since an `earlier` moment; waits for the GPU."""
        if self._event is None:
            return self._seconds - earlier._seconds
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1e3


def _by_shape(methods: Sequence[FlexLinearMethod]) -> dict[LayerGroup, list[FlexLinearMethod]]:
    """Group layers whose sets have equal sizes; a set may quantize equal shapes differently."""
    groups: dict[tuple[object, ...], list[FlexLinearMethod]] = {}
    for method in methods:
        sizes = tuple(_weight_bytes(method.weights(name)) for name in method.sets)
        shape = method.out_features, method.in_features
        groups.setdefault((*shape, *method.sets, *sizes), []).append(method)
    return {
        LayerGroup(first.prefix, first.out_features, first.in_features, len(group)): group
        for group in groups.values()
        for first in group[:1]
    }


def _weight_bytes(weights: WeightSet) -> int:
    return sum(parameter.nbytes for parameter in weights.parameters())
