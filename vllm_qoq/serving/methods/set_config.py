"""The config of one set, ours or vLLM's, found as vLLM finds that of a whole checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    get_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from vllm_qoq.checkpoint.format import QOQ_LINEAR, QOQ_RESIDUAL, QUANT_METHOD
from vllm_qoq.errors import FormatError
from vllm_qoq.serving.methods.qoq_linear import QoQLinearConfig
from vllm_qoq.serving.methods.qoq_residual import QoQResidualConfig

_OURS: Mapping[str, type[QuantizationConfig]] = {
    QOQ_LINEAR: QoQLinearConfig,
    QOQ_RESIDUAL: QoQResidualConfig,
}


def set_config(name: str, config: Mapping[str, Any]) -> QuantizationConfig:
    """Make the config of the set `name`; FormatError has vLLM's reason if vLLM refuses."""
    own = copy.deepcopy(dict(config))  # some classes edit what they are given
    method = own["quant_method"]
    if method in _OURS:
        return _OURS[method].from_config(own)
    method = own["quant_method"] = method.lower().replace(
        "compressed_tensors", "compressed-tensors"
    )
    try:
        return get_quantization_config(_overridden(own) or method).from_config(own)
    except Exception as error:  # whatever a stranger's config makes vLLM raise
        raise FormatError(
            f"quantization_config.sets.{name}: vLLM does not serve this {method} config: {error}; "
            "make the set anew with what it asks for, or serve with a vLLM that takes it"
        ) from error


def _overridden(config: dict[str, Any]) -> str | None:
    """Find the method of vLLM that takes over the config, as inc takes over auto-round's."""
    for candidate in QUANTIZATION_METHODS:
        if candidate == QUANT_METHOD:
            continue
        found = get_quantization_config(candidate).override_quantization_method(config, None)
        if found is not None:
            return str(found)
    return None
