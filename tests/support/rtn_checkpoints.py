"""The tiny model in the formats of other tools, by rounding to the nearest code: fast to make."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from convert import AWQ_ORDER, GROUP_SIZE, Tensors, pack
from safetensors.torch import load_file, save_file

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def read(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and the config of a folder with one shard."""
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors"), config


def write(out: Path, tensors: Tensors, config: dict[str, Any], files: Path) -> Path:
    """A checkpoint with the tokenizer of `files`."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()},
        out / "model.safetensors",
        {"format": "pt"},
    )
    (out / "config.json").write_text(json.dumps(config))
    for name in FILES:
        shutil.copy(files / name, out / name)
    return out


def w8a8(model: Path, out: Path, skip: Iterable[str] = (), **changes: Any) -> Path:
    """compressed-tensors, int8 per row and per token; `skip` are parts of layer names."""
    tensors, config = read(model)
    skip = tuple(skip)
    for layer in _layers(tensors, skip):
        weight = tensors[f"{layer}.weight"].float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[f"{layer}.weight"] = (weight / scale).round().to(torch.int8)
        tensors[f"{layer}.weight_scale"] = scale.bfloat16()
    shape = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**shape, "strategy": "channel", "dynamic": False},
        "input_activations": {**shape, "strategy": "token", "dynamic": True},
    }
    ignored = [n.removesuffix(".weight") for n in tensors if any(part in n for part in skip)]
    section = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *ignored],
        "config_groups": {"group_0": group},
    }
    return write(out, tensors, {**config, "quantization_config": section | changes}, model)


def w4a16(model: Path, out: Path, skip: Iterable[str] = (), **changes: Any) -> Path:
    """compressed-tensors, 4 bits in groups, packed along K; `skip` are parts of layer names."""
    tensors, config = read(model)
    skip = tuple(skip)
    for layer in _layers(tensors, skip):
        weight = tensors.pop(f"{layer}.weight")
        codes, scale, _ = _grouped(weight, is_symmetric=True)
        tensors |= {
            f"{layer}.weight_packed": pack(codes),
            f"{layer}.weight_scale": scale.bfloat16(),
            f"{layer}.weight_shape": torch.tensor(weight.shape),
        }
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    group = {
        "targets": ["Linear"],
        "weights": {**weights, "group_size": GROUP_SIZE, "dynamic": False},
        "input_activations": None,
    }
    ignored = [n.removesuffix(".weight") for n in tensors if any(part in n for part in skip)]
    section = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *ignored],
        "config_groups": {"group_0": group},
    }
    return write(out, tensors, {**config, "quantization_config": section | changes}, model)


def gptq(model: Path, out: Path, skip: Iterable[str] = (), **changes: Any) -> Path:
    """GPTQ, symmetric, packed along K; `changes` are keys of the quantization_config."""
    tensors, config = read(model)
    for layer in _layers(tensors, tuple(skip)):
        codes, scale, zero = _grouped(tensors.pop(f"{layer}.weight"), is_symmetric=True)
        tensors |= {
            f"{layer}.qweight": pack(codes).T.contiguous(),
            f"{layer}.qzeros": pack(zero.T - 1),
            f"{layer}.scales": scale.T.half().contiguous(),
            f"{layer}.g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // GROUP_SIZE,
        }
    section = {"quant_method": "gptq", "bits": 4, "group_size": GROUP_SIZE} | {
        "desc_act": False,
        "sym": True,
    }
    return write(out, tensors, {**config, "quantization_config": section | changes}, model)


def awq(model: Path, out: Path, skip: Iterable[str] = (), **changes: Any) -> Path:
    """AWQ, with zero points, packed along N."""
    tensors, config = read(model)
    for layer in _layers(tensors, tuple(skip)):
        codes, scale, zero = _grouped(tensors.pop(f"{layer}.weight"), is_symmetric=False)
        tensors |= {
            f"{layer}.qweight": pack(_interleaved(codes.T)),
            f"{layer}.qzeros": pack(_interleaved(zero.T)),
            f"{layer}.scales": scale.T.half().contiguous(),
        }
    section = {"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True}
    return write(out, tensors, {**config, "quantization_config": section | changes}, model)


def edit(folder: Path, change: Any) -> Path:
    """Let `change(tensors, config)` edit a checkpoint in place."""
    tensors, config = read(folder)
    change(tensors, config)
    stored = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _layers(tensors: Tensors, skip: tuple[str, ...]) -> list[str]:
    names = [n.removesuffix(".weight") for n in tensors if n.endswith(".weight")]
    linear = [name for name in names if "_proj" in name.rpartition(".")[2]]
    return [name for name in linear if not any(part in name for part in skip)]


def _grouped(
    weight: torch.Tensor, is_symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes 0..15 [N, K], scales and zero points [N, K / 128]."""
    n, k = weight.shape
    groups = weight.float().reshape(n, k // GROUP_SIZE, GROUP_SIZE)
    if is_symmetric:
        scale = groups.abs().amax(-1) / 7.5
        zero = torch.full_like(scale, 8)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = (high - low) / 15
        zero = (-low / scale).round()
    codes = (groups / scale[..., None]).round() + zero[..., None]
    return codes.clamp(0, 15).reshape(n, k).long(), scale, zero.long()


def _interleaved(codes: torch.Tensor) -> torch.Tensor:
    return codes.reshape(len(codes), -1, 8)[:, :, AWQ_ORDER].flatten(1)
