"""The int8 lm_head: rounded to the nearest, with a scale per row (token of the vocabulary).

The last norm is folded into it, so that after the rotation its inputs have no outliers and are
rounded to int8 as well.
"""

from __future__ import annotations

import torch

from vllm_qoq.models.table import LayerNames
from vllm_qoq.numerics.reference import quantize_per_token
from vllm_qoq.quantizer.model import Module
from vllm_qoq.quantizer.weights import assign


def int8_tensors(model: Module, names: LayerNames) -> dict[str, torch.Tensor]:
    """Make the checkpoint's tensors: weight int8 [V, K] and weight_scale float32 [V, 1].

    A row is rounded as a token is, to -127..127.
    """
    codes, scale, _ = quantize_per_token(_weight(model, names))
    return {f"{names.head}.weight": codes, f"{names.head}.weight_scale": scale[:, None]}


def round_weight(model: Module, names: LayerNames) -> None:
    """Give the model the weight that `int8_tensors` stand for, to be measured with."""
    codes, scale, _ = quantize_per_token(_weight(model, names))
    assign(model.get_submodule(names.head), "weight", codes * scale[:, None])


def _weight(model: Module, names: LayerNames) -> torch.Tensor:
    weight: torch.Tensor = model.state_dict()[f"{names.head}.weight"]
    return weight
