"""The reading of an engine's step counters by whoever has its configuration."""

from __future__ import annotations

from vllm.config import VllmConfig

from vllm_qoq.serving.plugin.config import QoQConfig
from vllm_qoq.serving.signals.counters import CounterReader, counter_file
from vllm_qoq.serving.vllm_versions import engine_index


def read_step_counts(vllm_config: VllmConfig) -> dict[tuple[str, str], int]:
    """Read the steps of the engine that `vllm_config` describes, by phase and set.

    Raises ValueError where its model was not loaded with the quantization method `qoq`, or runs on
    another host.
    """
    config = vllm_config.quant_config
    if not isinstance(config, QoQConfig):
        raise ValueError("step counts exist only for models loaded with quantization 'qoq'")
    path = counter_file(config.counter_stem, engine_index(vllm_config.parallel_config))
    reader = CounterReader(path, config.set_names)
    if reader.is_elsewhere():
        raise ValueError("the engine counts its steps on another host, where its first rank is")
    return reader.read()
