"""An engine in vLLM that times each set of a checkpoint, see `vllm_qoq.tuner.engine`.

All sets are loaded, whatever the checkpoint's routing says. The engine runs eagerly in this
process, so the layers can be called, and their routes changed between two steps.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm import LLM, SamplingParams
from vllm.config import set_current_vllm_config
from vllm.forward_context import get_forward_context

from vllm_qoq.errors import FormatError
from vllm_qoq.measuring import gpu as timing
from vllm_qoq.measuring.host import host_seconds
from vllm_qoq.models.names import LM_HEAD
from vllm_qoq.routing.table import Phase, Routing
from vllm_qoq.serving.methods.routed_linear import FlexLinearMethod
from vllm_qoq.serving.methods.steering import Steering, reaching
from vllm_qoq.serving.methods.weight_set import WeightSet
from vllm_qoq.serving.options import NAMESPACE
from vllm_qoq.serving.routing.policy import Policy
from vllm_qoq.serving.routing.step import current_step
from vllm_qoq.tuner.engine import LayerGroup

# A prompt of one token would be a decode step. Prompt and answer fit into one block of the cache.
_PROMPT, _STEPS = [0, 1], 12
_MODEL_LEN = 128
_KV_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
# vLLM refuses to start if less is free. The size of the KV cache is given apart.
_MEMORY_SHARE = 0.05
# Layers of one shape are called in turn until their weights are more than any cache holds.
_CACHES_BYTES = 1 << 30
# While the GPU sleeps so long, 0.1 s at 2 GHz, the CPU launches a whole step.
_SLEEP_CYCLES = 200_000_000


def open_engine(folder: Path, sets: tuple[str, ...], max_batch: int) -> TuneEngine:
    """Load all `sets` of the checkpoint `folder` for decode steps of up to `max_batch`."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    requests = max(max_batch, len(sets))
    llm = LLM(
        str(folder),
        max_model_len=_MODEL_LEN,
        max_num_seqs=requests,
        max_num_batched_tokens=max(len(_PROMPT) * requests, _MODEL_LEN),
        enforce_eager=True,
        enable_prefix_caching=False,
        trust_remote_code=False,
        gpu_memory_utilization=_MEMORY_SHARE,
        kv_cache_memory_bytes=_KV_BYTES["cuda" if torch.cuda.is_available() else "cpu"],
        additional_config={NAMESPACE: {"routing": reaching(sets)}},
        disable_log_stats=True,
    )
    (engine,) = llm.apply_model(lambda model: TuneEngine(llm, model))
    return engine


class TuneEngine:
    """The engine around the model of `llm`, which runs in this process."""

    def __init__(self, llm: LLM, model: nn.Module) -> None:
        self._llm, self._model = llm, model
        self._vllm_config = llm.llm_engine.vllm_config
        self._steering = Steering(model)
        self._methods = self._steering.linears
        if self._steering.experts:
            raise FormatError(
                f"{self._steering.experts[0].prefix}: experts in sets are not timed yet; write the "
                "routing by hand"
            )
        if not self._methods:
            raise FormatError("no linear layer is quantized in any set, so none can be measured")
        self._groups = _by_shape(self._methods)
        self._inputs: dict[tuple[int, int], torch.Tensor] = {}

    def layers(self) -> Sequence[LayerGroup]:
        """Group the routed linear layers of the model by shape."""
        return list(self._groups)

    def linear_seconds(self, layers: LayerGroup, set_name: str, tokens: int) -> float:
        """Measure `WeightSet.apply`, with quantization of the input and without an input_ratio.

        The product with the ratio is part of the norm's kernel in a compiled model.
        """
        weights = [method.weights(set_name) for method in self._groups[layers]]
        total = 0
        for count, one in enumerate(weights, 1):
            total += _weight_bytes(one)
            if total >= _CACHES_BYTES:
                weights = weights[:count]
                break
        x = self._input(tokens, layers.in_features)

        def call_of(one: WeightSet) -> Callable[[], object]:
            # A call returns nothing, because 32 outputs of 8192 tokens would be 15 GB.
            def call() -> None:
                one.apply(x, add_bias=False)

            return call

        return self._seconds([call_of(one) for one in weights])

    def head_seconds(self, tokens: int) -> float | None:
        """Measure the lm_head; None if the model has none of that name on this rank."""
        head = getattr(self._model, LM_HEAD, None)
        method: Any = getattr(head, "quant_method", None)
        if method is None:
            return None
        x = self._input(tokens, self._vllm_config.model_config.get_hidden_size())

        def call() -> None:
            method.apply(head, x)

        return self._seconds([call])

    def step_seconds(self, routing: Routing, batch: int) -> float | None:
        """Measure decode steps of `batch` requests with `routing`; the result is their median."""
        if batch >= self._vllm_config.cache_config.num_gpu_blocks:  # one block is vLLM's own
            return None
        self._steering.follow(routing)
        timer = _ForwardTimer(self._methods[0].policy, batch)
        hooks = (
            self._model.register_forward_pre_hook(timer.before),
            self._model.register_forward_hook(timer.after),
        )
        try:
            sampling = SamplingParams(
                temperature=0, max_tokens=_STEPS + 1, ignore_eos=True, detokenize=False
            )
            prompts = [{"prompt_token_ids": list(_PROMPT)} for _ in range(batch)]
            self._llm.generate(prompts, sampling, use_tqdm=False)
        finally:
            for hook in hooks:
                hook.remove()
        return timer.seconds()

    def _input(self, tokens: int, features: int) -> torch.Tensor:
        key = tokens, features
        if key not in self._inputs:
            self._inputs = {}  # Only the last one is kept.
            x = torch.randn(key, device=self._device())
            self._inputs[key] = x.to(self._vllm_config.model_config.dtype)
        return self._inputs[key]

    def _device(self) -> str:
        return str(self._vllm_config.device_config.device_type)

    def _seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        with torch.inference_mode(), set_current_vllm_config(self._vllm_config):
            if self._device() != "cuda":
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

    def seconds(self) -> float | None:
        """Compute the median of the steps' seconds; None if there was no step."""
        if not self._times:
            return None
        return statistics.median(time() for time in self._times)


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
