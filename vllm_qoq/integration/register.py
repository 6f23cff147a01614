"""What the entry point `vllm.general_plugins` does in each of vLLM's processes."""

from __future__ import annotations

from vllm.model_executor.layers.quantization import register_quantization_config

from vllm_qoq.format import QUANT_METHOD
from vllm_qoq.integration.config import QoQConfig
from vllm_qoq.integration.models import register_models


def register_with_vllm() -> None:
    """Register the quantization method and the model classes."""
    register_quantization_config(QUANT_METHOD)(QoQConfig)
    register_models()
