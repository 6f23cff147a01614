"""The checks where the server or `LLM()` is started, before there is an engine.

Engines start in processes of their own and take a minute; what they raise stands in the middle of
the log. So whatever can be known from the configuration alone is refused here.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_qoq import cards, kernel_library, ops
from vllm_qoq.checkpoint import k_mean
from vllm_qoq.checkpoint.format import QOQ_LINEAR, QOQ_RESIDUAL, Section
from vllm_qoq.checkpoint.kv_config import KVCache
from vllm_qoq.errors import FormatError
from vllm_qoq.routing.table import Routing, RoutingError
from vllm_qoq.serving.kv.cache import check_kv_cache, check_without_sets, kv_cache_in_force
from vllm_qoq.serving.methods.hidden_states import check_engine
from vllm_qoq.serving.options import Options
from vllm_qoq.serving.plugin import stat_logger_plugin
from vllm_qoq.serving.plugin.adapters import check_adapters
from vllm_qoq.serving.plugin.local import local_checkpoint
from vllm_qoq.serving.plugin.named_adapters import check_named_adapters
from vllm_qoq.serving.routing.policy import routing_in_force
from vllm_qoq.serving.signals import queue
from vllm_qoq.serving.signals.trace import Trace
from vllm_qoq.serving.speculation import check_speculation
from vllm_qoq.serving.vllm_versions import (
    FrontEnd,
    api_process_count,
    api_process_rank,
    front_end_in_the_making,
)

if TYPE_CHECKING:
    from vllm_qoq.serving.plugin.config import QoQConfig

logger = init_logger("vllm." + __name__)

_MULTIPROCESS_PROMETHEUS = "PROMETHEUS_MULTIPROC_DIR"


def prepare(config: QoQConfig) -> None:
    """Refuse what the engine would refuse later, and offer the stat logger where it has a use.

    Does nothing where vLLM is not making an engine's configuration, for example for the draft
    model of a running engine. Raises UserError.
    """
    front_end = front_end_in_the_making()
    if front_end is None:
        return
    stat_logger_plugin.withdraw()
    routing = check(config, front_end)
    if front_end.vllm_config.device_config.device_type == "cuda":
        _say_kernels()
    follows_load = routing is not None and routing.load is not None
    if not is_shown(front_end.vllm_config):
        if front_end.counts_statistics and front_end.is_server:
            logger.warning(
                "/metrics has no vllm:qoq_* and the log no steps by set: they need a single API "
                "process, in Python (--api-server-count 1), and no %s in its environment",
                _MULTIPROCESS_PROMETHEUS,
            )
    elif front_end.counts_statistics or follows_load:
        stat_logger_plugin.offer()


def check(config: QoQConfig, front_end: FrontEnd) -> Routing | None:
    """Raise UserError unless an engine can start; returns the routing in force if it has sets."""
    vllm_config = front_end.vllm_config
    options = Options.of(vllm_config)
    routing = None
    if config.section is None:
        check_without_sets(config.checkpoint_kv_cache, vllm_config)
    else:
        check_adapters(config.section, vllm_config)
        check_named_adapters(front_end.adapters, vllm_config)
        check_speculation(vllm_config)
        check_engine(config.section, vllm_config)
        routing = routing_in_force(config.section, options)
        if routing.load is not None:
            will_tell = front_end.is_server and api_process_rank(vllm_config.parallel_config) >= 0
            queue.check_engine(vllm_config, will_tell or queue.is_writer_here())
        _check_kernels(config.section, routing, vllm_config.device_config.device_type)
    in_force = kv_cache_in_force(config.checkpoint_kv_cache, options)
    check_kv_cache(in_force, vllm_config)
    _check_means(in_force, vllm_config)
    if options.trace is not None:
        Trace(options.trace, engine=0).close()
    return routing


def _check_means(in_force: KVCache, vllm_config: VllmConfig) -> None:
    """Raise FormatError unless the means of K in the files are those that config.json announces.

    Reads headers, of folders only.
    """
    checkpoint = local_checkpoint(vllm_config)
    if checkpoint is None or (in_force.k_mean and not in_force.is_quantized()):
        return  # the means are left out of a cache that is not quantized
    for finding in k_mean.structure(checkpoint, in_force):
        raise FormatError(f"{checkpoint.path}: {finding}")


def is_shown(vllm_config: VllmConfig) -> bool:
    """Whether the process that answers /metrics is this one, and reads more than shared files.

    Several API processes share their metrics through files of prometheus_client, which hold no
    numbers of ours; so do those of a Rust front end, which is a process of its own.
    """
    parallel = vllm_config.parallel_config
    is_only = api_process_count(parallel) == 1 and api_process_rank(parallel) >= 0
    return is_only and _MULTIPROCESS_PROMETHEUS not in os.environ


def _check_kernels(section: Section, routing: Routing, device_type: str) -> None:
    """Raise RoutingError for a set of ours that this GPU or this build does not compute."""
    of_ours = [
        name
        for name in section.sets
        if name in routing.sets()
        and section.sets[name]["quant_method"] in (QOQ_LINEAR, QOQ_RESIDUAL)
    ]
    if device_type != "cuda" or not of_ours:
        return
    codes, lacking = kernel_library.built_for(), ops.missing_ops(device_type)
    capability = _capability()
    problem: kernel_library.Problem | None
    if codes is None and capability is None:
        problem = kernel_library.NO_LIBRARY
    elif capability is None:
        problem = kernel_library.without(lacking) if lacking else None
    else:
        gpu = current_platform.get_device_name()
        problem = kernel_library.problem_of(gpu, capability, codes, lacking)
    if problem is None:
        return
    raise RoutingError(
        f"the routing uses the set {of_ours[0]!r}, and {problem}; or leave the set out with "
        """--additional-config '{"qoq": {"force_set": ...}}' and one of """
        f"{', '.join(name for name in section.sets if name not in of_ours) or 'another checkpoint'}"
    )


def _say_kernels() -> None:
    """Log which of our kernels this GPU runs, if any."""
    codes, capability = kernel_library.built_for(), _capability()
    choice = codes and capability and kernel_library.choice(capability, codes)
    if choice and capability:
        gpu = f"{current_platform.get_device_name()} ({cards.name(capability)})"
        logger.info("Kernels of vllm-qoq on %s: %s", gpu, choice)


def _capability() -> cards.Capability | None:
    """Ask vLLM for the compute capability. It asks NVML; torch would start CUDA here."""
    found = current_platform.get_device_capability()
    return found and (found[0], found[1])
