"""The routing in force in one engine: the checkpoint's, or what the user says instead."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from vllm.config import CompilationConfig, CUDAGraphMode, VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    model_parallel_is_initialized,
)
from vllm.logger import init_logger

from vllm_qoq.checkpoint.format import Section
from vllm_qoq.routing.table import LayerRoute, Phase, Routing, RoutingError, Step
from vllm_qoq.serving.options import NAMESPACE, Options
from vllm_qoq.serving.signals.counters import StepCounters, counter_file
from vllm_qoq.serving.signals.queue import LoadReader, check_engine, load_file
from vllm_qoq.serving.signals.trace import Trace
from vllm_qoq.serving.speculation import is_draft, most_decode_tokens
from vllm_qoq.serving.vllm_versions import engine_index

logger = init_logger("vllm." + __name__)  # below vLLM's, so that its settings apply


def routing_in_force(section: Section, options: Options) -> Routing:
    """Find the routing in force: the checkpoint's table, unless the options replace it."""
    sets = section.sets
    if options.force_set is not None:
        if options.force_set not in sets:
            raise RoutingError(
                f"--additional-config: {NAMESPACE}.force_set is {options.force_set!r}, but the "
                f"checkpoint has {', '.join(sets)}"
            )
        return Routing.forced(options.force_set)
    routing = section.routing
    if options.routing is not None:
        routing = Routing.parse(options.routing, sets)
    if options.force_load is None:
        return routing
    is_busy = options.force_load == "busy"
    if is_busy and routing.load is None:
        raise RoutingError(
            f"--additional-config: {NAMESPACE}.force_load is 'busy', but the routing has no "
            "'load'; leave it out"
        )
    return routing.in_state(is_busy)


class Policy:
    """The routing of one engine in one process, with the facts that a decision needs."""

    def __init__(
        self,
        section: Section,
        vllm_config: VllmConfig,
        counter_stem: str,
        map_name: Callable[[str], str],
        has_load_writer: bool,
    ) -> None:
        options = Options.of(vllm_config)
        self._map_name = map_name
        self.use(routing_in_force(section, options))
        self.compilation_config: CompilationConfig = vllm_config.compilation_config
        self.tokens_per_request = most_decode_tokens(vllm_config, is_draft(vllm_config))
        self.max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        self._layers: list[str] = []
        self._is_pipeline = vllm_config.parallel_config.pipeline_parallel_size > 1
        index = engine_index(vllm_config.parallel_config)
        self._trace: Trace | None = None
        if options.trace is not None and _is_first_rank():
            self._trace = Trace(options.trace, index)
        device = torch.device(vllm_config.device_config.device_type)
        self.load: LoadReader | None = None
        if self.routing.load is not None:
            check_engine(vllm_config, has_load_writer)
            self.load = LoadReader(load_file(counter_stem, index), device)
        self._counters: StepCounters | None = None
        if _is_first_rank():
            path = counter_file(counter_stem, index)
            self._counters = StepCounters(path, tuple(section.sets), device)
        logger.info("Routing in force: %s", json.dumps(self.routing.to_json()))

    def use(self, routing: Routing) -> None:
        """Put `routing` in force, with names as in the checkpoint."""
        self.routing = routing.rename(self._map_name)
        self.default_route = self.routing.route([])

    def route(self, prefix: str, parts: list[str]) -> LayerRoute:
        """Find the route of the layer `prefix`, which fuses the checkpoint layers `parts`."""
        self._layers += (prefix, *parts)
        return self.routing.route(parts, fused_name=prefix)

    def reachable(self, route: LayerRoute) -> frozenset[str]:
        """List the sets that `route` can choose in this engine."""
        return route.reachable(self._largest_batch())

    def pairs(self, route: LayerRoute) -> frozenset[tuple[Phase, str, str]]:
        """List phase, calm and busy set of this engine's steps in which the two sets differ."""
        return frozenset(
            (phase, calm, busy)
            for phase, calm, busy in route.pairs(self._largest_batch())
            if calm != busy
        )

    def has_graphs(self) -> bool:
        """Whether CUDA graphs freeze what a step does; vLLM may still lower the mode."""
        return self.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE)

    def follow_load(self) -> bool | None:
        """Give the state for a `Step` that begins now, False without a `load`.

        With CUDA graphs it is None: the device has the state, from here on in the order of the
        current stream, and a graph that captures the step reads it anew at every replay.
        """
        if self.load is None:
            return False
        if not self.has_graphs():
            return self.load.read()
        self.load.copy()
        return None

    def _largest_batch(self) -> int:
        # Requests may all have fewer tokens than they may have, where little is speculated.
        return max(self._padded_batch(1), self._padded_batch(self.tokens_per_request))

    def _padded_batch(self, tokens: int) -> int:
        sizes = self.compilation_config.cudagraph_capture_sizes or []
        # A decode step is padded to the next captured size, which may exceed max_num_seqs.
        padded = [size for size in sizes if size >= self.max_num_seqs * tokens]
        return -(-min(padded, default=self.max_num_seqs * tokens) // tokens)

    def check_rules(self) -> None:
        """Refuse layer rules that match nothing; call when all layers exist."""
        unmatched = [] if self._is_pipeline else self.routing.unmatched(self._layers)
        if unmatched:
            raise RoutingError(
                f"the layer rule {unmatched[0]!r} matches no quantized layer of this model; "
                f"names look like {self._layers[-1]!r}"
            )

    def record(self, step: Step, num_tokens: int, mode: str) -> None:
        """Count a step with real requests, and trace it if asked to."""
        route = self.default_route
        sets = route.pair(step) if step.is_busy is None else (route.choose(step),)
        if self._counters is not None:
            self._count(self._counters, step.phase, sets)
        if self._trace is not None:
            line = {
                "phase": step.phase.name.lower(),
                "set": sets[0],
                "num_tokens": num_tokens,
                "cudagraph_mode": mode,
            }
            if self.load is not None:
                line["busy"] = step.is_busy
            if step.is_busy is None:
                line["set_if_busy"] = sets[-1]
            self._trace.write(line)

    def _count(self, counters: StepCounters, phase: Phase, sets: tuple[str, ...]) -> None:
        if self.load is None or len(set(sets)) == 1:
            counters.add(phase, sets[0])
            return
        # One of the flags is 1, and only the device knows which.
        for name, flag in zip(sets, (self.load.is_calm, self.load.is_busy), strict=True):
            counters.add(phase, name, flag[0])


def _is_first_rank() -> bool:
    if not model_parallel_is_initialized():
        return True
    return get_tensor_model_parallel_rank() == 0 and get_pp_group().is_first_rank
