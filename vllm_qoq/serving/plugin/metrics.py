"""Our metrics in vLLM's log and Prometheus endpoint: step counts, the load, and the KV cache.

vLLM makes one `RoutingStatLogger` per engine in the front end of a server that serves a model of
ours (`stat_logger_plugin`). It shows

    vllm:qoq_steps_total{model_name, engine, phase="prefill|decode", set}

and logs what ran since the last report, also when the process ends. The
counters are read when somebody asks, never at a step. For a routing with a
`load` it sees at every step how many requests wait, tells the engine when that
makes it busy or calm, and shows

    vllm:qoq_busy{model_name, engine}                 1 while the engine is busy
    vllm:qoq_load_switches_total{model_name, engine}

vLLM's own metric of the cache has the type that `--kv-cache-dtype` names, which stays `auto` for a
quantized one. For that there is

    vllm:qoq_kv_cache_info{model_name, engine, bits, hadamard}      always 1
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_qoq.serving.kv.cache import kv_cache_in_force
from vllm_qoq.serving.options import Options
from vllm_qoq.serving.plugin.config import QoQConfig
from vllm_qoq.serving.routing.policy import routing_in_force
from vllm_qoq.serving.signals.counters import CounterReader, counter_file
from vllm_qoq.serving.signals.queue import LoadWriter, announce_writer, load_file

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import SchedulerStats

logger = init_logger("vllm." + __name__)

Counts = dict[tuple[str, str], int]

# A server's front end loads this module before it starts its engines, and only then makes the
# loggers. LLM() never loads it.
announce_writer()


class RoutingStatLogger(StatLoggerBase):
    """Reports the steps of one engine; it is silent for another model in the same process."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        config = vllm_config.quant_config
        self._reader: CounterReader | None = None
        self.load: LoadWriter | None = None
        if not isinstance(config, QoQConfig):
            return
        options = Options.of(vllm_config)
        self.kv_cache = kv_cache_in_force(config.checkpoint_kv_cache, options)
        self._reader = CounterReader(
            counter_file(config.counter_stem, engine_index), config.set_names
        )
        self._engine = str(engine_index)
        if config.section is not None:
            routing = routing_in_force(config.section, options)
            if routing.load is not None:
                path = load_file(config.counter_stem, engine_index)
                self.load = LoadWriter(path, routing.load, self._engine)
        self._model = vllm_config.model_config.served_model_name
        self._at_start: Counts = {}
        self._at_last_log: Counts = {}
        _collector.add(self._model, self._engine, self)

    def record(
        self, scheduler_stats: SchedulerStats | None, *args: object, **kwargs: object
    ) -> None:
        """Follow the queue after a step; `scheduler_stats` is None where the step has none.

        Requests that vLLM defers wait for something else than room in a step, a grammar or a
        cache that is on its way, and are counted apart.
        """
        if self.load is not None and scheduler_stats is not None:
            self.load.update(scheduler_stats.num_waiting_reqs)

    def log_engine_initialized(self) -> None:
        """Leave out the steps that vLLM ran to capture CUDA graphs; log the last ones at exit."""
        if self._reader is not None:
            if self._reader.is_elsewhere():
                logger.warning(
                    "Engine %s counts its steps on another host, where its first rank is: "
                    "vllm:qoq_steps_total stays zero, and the log has no steps by set",
                    self._engine,
                )
            self._at_start = self._reader.read()
            # `vllm run-batch` never asks for a log, and a server not for its last seconds.
            atexit.register(self.log)

    def log(self) -> None:
        """Log the steps since the last call, if there were any."""
        if self._reader is None:
            return
        counts = self.counts()
        new = {key: n - self._at_last_log.get(key, 0) for key, n in counts.items()}
        self._at_last_log = counts
        if any(new.values()):
            steps = ", ".join(f"{phase} {name}: {n}" for (phase, name), n in new.items() if n)
            logger.info(
                "Engine %s: steps by phase and set since the last report: %s", self._engine, steps
            )

    def counts(self) -> Counts:
        """Count the steps since the engine was ready, by (phase, set)."""
        assert self._reader is not None
        return {key: n - self._at_start.get(key, 0) for key, n in self._reader.read().items()}


class _RoutingCollector(Collector):
    """Reads the counters of all engines of this process when Prometheus scrapes."""

    def __init__(self) -> None:
        self._loggers: dict[tuple[str, str], RoutingStatLogger] = {}

    def add(self, model: str, engine: str, stat_logger: RoutingStatLogger) -> None:
        if not self._loggers:
            REGISTRY.register(self)
        self._loggers[model, engine] = stat_logger

    def collect(self) -> Iterator[Metric]:
        steps = CounterMetricFamily(
            "vllm:qoq_steps",
            "Engine steps by phase (prefill: any request reads its prompt) and weight set.",
            labels=["model_name", "engine", "phase", "set"],
        )
        for (model, engine), stat_logger in self._loggers.items():
            for (phase, name), count in stat_logger.counts().items():
                steps.add_metric([model, engine, phase, name], count)
        yield steps
        busy = GaugeMetricFamily(
            "vllm:qoq_busy",
            "Whether the queue is so long that the sets of routing.load are used.",
            labels=["model_name", "engine"],
        )
        switches = CounterMetricFamily(
            "vllm:qoq_load_switches",
            "How often an engine became busy or calm.",
            labels=["model_name", "engine"],
        )
        cache = GaugeMetricFamily(
            "vllm:qoq_kv_cache_info",
            "In how many bits keys and values are stored, by layer rules in several.",
            labels=["model_name", "engine", "bits", "hadamard"],
        )
        for key, stat_logger in self._loggers.items():
            if stat_logger.kv_cache.is_quantized():
                is_rotated = str(stat_logger.kv_cache.hadamard).lower()
                cache.add_metric([*key, stat_logger.kv_cache.all_bits(), is_rotated], 1)
            if stat_logger.load is not None:
                busy.add_metric(key, stat_logger.load.is_busy)
                switches.add_metric(key, stat_logger.load.switches)
        yield from (family for family in (busy, switches, cache) if family.samples)


_collector = _RoutingCollector()
