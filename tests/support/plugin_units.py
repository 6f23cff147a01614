"""What the unit tests of the plugin share: a config, a section, layers with a mocked TP size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)

from vllm_qoq.serving.plugin.config import QoQConfig

HIDDEN, HEAD, HEADS, KV_HEADS, GROUP = 256, 64, 4, 2, 128
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ROUTING = {"prefill": "w8a8", "decode": [{"max_batch": 4, "set": "w4a16"}, {"set": "w8a8"}]}


def scheme(bits: int, **weights: Any) -> dict[str, Any]:
    """The compressed-tensors config of W8A8 (bits 8) or W4A16 (bits 4)."""
    common = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    own = {"strategy": "channel"} if bits == 8 else {"strategy": "group", "group_size": GROUP}
    activations = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if bits == 8 else "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": common | own | weights,
                "input_activations": activations if bits == 8 else None,
            }
        },
    }


def section(**changes: Any) -> dict[str, Any]:
    sets = {"w8a8": scheme(8), "w4a16": scheme(4)}
    return {"quant_method": "qoq", "format_version": 1, "sets": sets, "routing": ROUTING} | changes


def vllm_config(**changes: Any) -> VllmConfig:
    return VllmConfig(device_config=DeviceConfig("cpu"), **changes)


def qoq_config(**changes: Any) -> QoQConfig:
    config = QoQConfig.from_config(section(**changes))
    config.packed_modules_mapping = PACKED
    return config


def in_tree_config(bits: int) -> CompressedTensorsConfig:
    config = CompressedTensorsConfig.from_config(scheme(bits))
    config.packed_modules_mapping = PACKED
    return config


@contextmanager
def tensor_parallel(rank: int, size: int, config: VllmConfig) -> Iterator[None]:
    """Build and load layers as rank `rank` of `size`, without any process group."""
    modules = (
        "vllm.model_executor.layers.linear",
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "vllm.model_executor.parameter",
        "vllm.distributed.parallel_state",
        "vllm.distributed",
    )
    with ExitStack() as stack:
        stack.enter_context(set_current_vllm_config(config))
        for module in modules:
            for name, value in (("rank", rank), ("world_size", size)):
                target = f"{module}.get_tensor_model_parallel_{name}"
                stack.enter_context(patch(target, lambda value=value: value))
        yield


def tensors(bits: int, rows: int, columns: int, seed: int) -> dict[str, torch.Tensor]:
    """Random tensors of one quantized layer, by leaf, as llmcompressor stores them."""
    random = torch.Generator().manual_seed(seed)
    if bits == 8:
        weight = torch.randint(-127, 128, (rows, columns), generator=random, dtype=torch.int8)
        return {"weight": weight, "weight_scale": torch.rand(rows, 1, generator=random).bfloat16()}
    packed = torch.randint(
        -(2**31), 2**31 - 1, (rows, columns // 8), generator=random, dtype=torch.int32
    )
    return {
        "weight_packed": packed,
        "weight_scale": torch.rand(rows, columns // GROUP, generator=random).bfloat16(),
        "weight_shape": torch.tensor([rows, columns]),
    }
