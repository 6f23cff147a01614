"""QoQ checkpoints of a small model, made by rounding to the nearest code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vllm_qoq.checkpoint.format import join_name
from vllm_qoq.numerics.packing import pack_nibbles
from vllm_qoq.numerics.reference import RESIDUAL_ZERO, dequantize, int8_weight

GROUP = 128
LEVEL1_MAX = 119  # QServe's protective range: 119 plus half a step of level 2 is an int8
PER_CHANNEL = -1


def round_to_nearest(weight: torch.Tensor, group_size: int = GROUP) -> dict[str, torch.Tensor]:
    """Leaf -> tensor of a layer with this weight, float [N, K]."""
    weight = weight.float()
    if group_size == PER_CHANNEL:
        return _per_channel(weight)
    return _two_levels(weight, group_size)


def write_plain(model: Path, out: Path, group_size: int = GROUP) -> Path:
    """A checkpoint with one set and no section of ours, which `merge` takes."""
    config = {"quant_method": "qoq_linear", "group_size": group_size, "ignore": ["lm_head"]}
    return _write(model, out, None, group_size, config)


def write_checkpoint(model: Path, out: Path, group_size: int = GROUP) -> Path:
    """A checkpoint of ours with the single set `w4a8`."""
    config = {
        "quant_method": "qoq",
        "format_version": 1,
        "sets": {"w4a8": {"quant_method": "qoq_linear", "group_size": group_size}},
        "routing": {"prefill": "w4a8", "decode": [{"set": "w4a8"}]},
    }
    return _write(model, out, "w4a8", group_size, config)


def nested(
    weight: torch.Tensor, group_size: int = GROUP
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Leaves of the base and of the residual of a layer; ties of codes may be one off in int8."""
    base = round_to_nearest(weight, group_size)
    exact = (weight.float() / base["channel_scale"][:, None]).round()
    residual = (exact - int8_weight(base) + RESIDUAL_ZERO).clamp(0, 15)
    return base, {"qresidual": pack_nibbles(residual.to(torch.uint8))}


NESTED = {
    "w8a8": {"quant_method": "qoq_residual", "base": "w4a8"},
    "w4a8": {"quant_method": "qoq_linear", "group_size": GROUP},
}


def write_nested(model: Path, out: Path) -> Path:
    """A checkpoint of ours with `w4a8` and the nested `w8a8`: prompts in 8 bits."""

    def tensors_of(layer: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        sets = zip(("w4a8", "w8a8"), nested(weight), strict=True)
        return {f"{name}.{layer}.{leaf}": t for name, leaves in sets for leaf, t in leaves.items()}

    _copy(model, out, tensors_of)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "qoq",
        "format_version": 1,
        "sets": NESTED,
        "routing": {"prefill": "w8a8", "decode": [{"set": "w4a8"}]},
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out


def write_dequantized(model: Path, out: Path, group_size: int = GROUP) -> Path:
    """The model with every weight replaced by what its QoQ tensors stand for, in bf16."""

    def tensors_of(layer: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {f"{layer}.weight": dequantize(round_to_nearest(weight, group_size)).bfloat16()}

    _copy(model, out, tensors_of)
    return out


def _two_levels(weight: torch.Tensor, group_size: int) -> dict[str, torch.Tensor]:
    n, k = weight.shape
    channel_scale = weight.abs().amax(1) / LEVEL1_MAX
    level1 = (weight / channel_scale[:, None]).round()
    level1 = torch.nn.functional.pad(level1, (0, -k % group_size), mode="replicate")
    level1 = level1.view(n, -1, group_size)
    low, high = level1.amin(2), level1.amax(2)
    # 15 steps reach 7 below or above `high`, at most 126.
    group_scale = ((high - low) / 15).round().clamp(1, 16)
    codes = ((level1 - low[:, :, None]) / group_scale[:, :, None]).round().clamp(0, 15)
    return {
        "qweight": pack_nibbles(codes.view(n, -1)[:, :k].to(torch.uint8)),
        "channel_scale": channel_scale,
        "group_scale": group_scale.to(torch.uint8),
        "group_offset": low.to(torch.int8),
    }


def _per_channel(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    low, high = weight.amin(1), weight.amax(1)
    channel_scale = (high - low) / 15
    codes = ((weight - low[:, None]) / channel_scale[:, None]).round().clamp(0, 15)
    return {
        "qweight": pack_nibbles(codes.to(torch.uint8)),
        "channel_scale": channel_scale,
        "channel_zero": -low,
    }


def _write(
    model: Path, out: Path, set_name: str | None, group_size: int, quantization: dict[str, object]
) -> Path:
    def tensors_of(layer: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        leaves = round_to_nearest(weight, group_size)
        return {join_name(set_name, f"{layer}.{leaf}"): t for leaf, t in leaves.items()}

    _copy(model, out, tensors_of)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = quantization
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out


def _copy(
    model: Path, out: Path, tensors_of: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]
) -> None:
    """Copy a model with the tensors of its linear layers replaced."""
    shutil.copytree(model, out)
    tensors = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        tensors |= tensors_of(layer, tensor) if layer.endswith("_proj") else {name: tensor}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
